"""A test of a running server: its health, and a short response of each model."""

from __future__ import annotations

import json

import httpx

from medley.errors import PartialFailure, UserError

TIMEOUT = 120.0  # seconds


def probe(url: str, token: str | None) -> None:
    """Prints the health of a server and a response of each model.

    Raises UserError if the server does not respond, PartialFailure if it is not healthy or a model
    fails.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    base = url.rstrip("/")
    failures = []
    try:
        with httpx.Client(base_url=base, headers=headers, timeout=TIMEOUT) as client:
            health = client.get("/health")
            print(f"{base}/health: {health.status_code} {health.text}")
            models = client.get("/v1/models")
            if models.status_code != 200:
                raise UserError(f"{base}/v1/models: Status {models.status_code} ({models.text}).")
            for model in models.json()["data"]:
                if model.get("root", model["id"]) != model["id"]:  # a name with a mode
                    continue
                body = {"model": model["id"], "max_tokens": 16, "mode": "text", "temperature": 0,
                        "messages": [{"role": "user", "content": "Hello"}]}  # fmt: skip
                response = client.post("/v1/chat/completions", json=body)
                if response.status_code == 200:
                    text = response.json()["choices"][0]["message"]["content"]
                    print(f"{model['id']}: {json.dumps(text, ensure_ascii=False)}")
                else:
                    failures.append(f"{model['id']}: {response.status_code} {response.text}")
    except (httpx.HTTPError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{base}: {error}") from error
    if health.status_code != 200:
        failures.append(f"{base}/health: {health.status_code}")
    if failures:
        raise PartialFailure("; ".join(failures))
