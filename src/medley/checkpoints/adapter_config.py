"""The options in an adapter's `adapter_config.json`: which are covered, and which are refused.

The list is closed. An option that is neither covered nor without effect on the weights is refused
by its name, also one of a PEFT that is newer than this list.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft

from medley.errors import UserError
from medley.utils.config_files import MAX_SIZE, read_json_object, shown

CONFIG_FILE = "adapter_config.json"

# Initial values that leave the base's weights unchanged.
_INIT_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")

# Options that a merge follows, or that choose which modules have saved tensors.
_COVERED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
    "init_lora_weights", "trainable_token_indices", "use_bdlora", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "target_parameters",
}  # fmt: skip
# Options that do not change what the saved tensors mean.
_NO_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "megatron_core", "runtime_config", "qalora_group_size",
    "fan_in_fan_out",  # PEFT ignores it for linear layers, and Chameleon has no others
    "eva_config", "loftq_config", "corda_config", "lora_ga_config",  # used by init_lora_weights
    "ensure_weight_tying",  # a merge into a tied head is refused
}  # fmt: skip
_REASONS = {
    "use_dora": "DoRA scales each row of the weights",
    "lora_bias": "it trains biases that the base does not have",
    "bias": "it trains biases that the base does not have",
    "layer_replication": "the trained model has more layers than the base",
    "alora_invocation_tokens": "aLoRA changes the model only after its invocation tokens, which "
    "decoding with a cache and packed sequences do not track",
    "use_qalora": "QALoRA averages groups of inputs",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA has singular values of its own",
    "velora_config": "VeLoRA has projections of its own",
    "monteclora_config": "MonteCLoRA samples its weights",
    "megatron_config": "Megatron's layers are not Chameleon's",
}
_DEFAULTS: dict[str, Any] = {
    field.name: field.default
    if field.default_factory is dataclasses.MISSING
    else field.default_factory()
    for field in dataclasses.fields(peft.LoraConfig)
}
# PEFT applies these, though they cannot be merged.
_APPLIED_ONLY = {
    "use_dora", "lora_bias", "layer_replication", "kasa_config", "velora_config",
    "monteclora_config",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """The options of an adapter that its merge depends on.

    Attributes:
        token_indices: module name (its end) -> ids of the token rows that were trained
        blocks: number of blocks of a block-diagonal matrix (BD-LoRA)
    """

    path: Path
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, float]
    alpha_pattern: dict[str, float]
    token_indices: dict[str, list[int]]
    blocks: int
    modules_to_save: tuple[str, ...]
    init: str | bool | None
    options: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Raises UserError that names the option for everything that is not an adapter's."""
        path = folder / CONFIG_FILE
        options = read_json_object(path)
        blocks = options.get("use_bdlora")
        nested = blocks if isinstance(blocks, dict) else {}
        init = options.get("init_lora_weights", True)
        if init is not None and not isinstance(init, bool | str):
            raise _wrong(path, "init_lora_weights", init, "true, false or a name")
        saved = options.get("modules_to_save") or []
        if not isinstance(saved, list):
            raise _wrong(path, "modules_to_save", saved, "a list of names")
        return cls(
            path,
            rank=int(_number(path, "r", options.get("r", 8))),
            alpha=_number(path, "lora_alpha", options.get("lora_alpha", 8)),
            use_rslora=bool(options.get("use_rslora")),
            rank_pattern=_patterns(path, "rank_pattern", options.get("rank_pattern")),
            alpha_pattern=_patterns(path, "alpha_pattern", options.get("alpha_pattern")),
            token_indices=_token_indices(path, options.get("trainable_token_indices")),
            blocks=int(_number(path, "use_bdlora.nblocks", nested.get("nblocks", 1))),
            modules_to_save=tuple(map(str, saved)),
            init=init,
            options=options,
        )

    def check(self, merging: bool) -> None:
        """Raises UserError for an option that is not covered, by its name.

        Args:
            merging: False if PEFT applies the adapter without merging. It then covers more.
        """
        kind = self.options.get("peft_type")
        if str(kind).upper() != "LORA":
            raise _wrong(self.path, "peft_type", kind, "LORA")
        for name, value in self.options.items():
            if name in _COVERED | _NO_EFFECT or not self._is_set(name, value):
                continue
            if name in _DEFAULTS and name in _APPLIED_ONLY and not merging:
                continue
            raise self._refused(name, value, merging)
        if self.options.get("bias", "none") not in ("none", None) and merging:
            raise self._refused("bias", self.options["bias"], merging)
        init = self.init.lower() if isinstance(self.init, str) else self.init
        kept = init is None or isinstance(init, bool) or init in _INIT_KEEPS_BASE
        repeatable = init in ("pissa", "olora")  # pissa_niter_N decomposes at random
        if not kept and (merging or not repeatable):
            what = "changed the base's weights when training began"
            raise UserError(
                f"{self.path}: Unsupported init_lora_weights (got {self.init!r}, expected true, "
                f"false or {', '.join(_INIT_KEEPS_BASE)}): it {what}. Save the adapter again with "
                "PEFT's path_initial_model_for_weight_conversion, which makes a plain one of it."
            )

    @staticmethod
    def _is_set(name: str, value: Any) -> bool:
        """Whether an option has another value than the one that means "not used"."""
        if value is None or value is False or value in ("", [], {}):
            return False
        return not (name in _DEFAULTS and value == _DEFAULTS[name])

    def _refused(self, name: str, value: Any, merging: bool) -> UserError:
        reason = _REASONS.get(name, "this option is unknown here; does it come from a newer PEFT?")
        text = repr(value)
        got = text if len(text) < 80 else text[:76] + " ..."
        action = "merged" if merging else "applied"
        return UserError(
            f"{self.path}: Unsupported {name} (got {got}, expected {_DEFAULTS.get(name)!r}): "
            f"{reason}. Such an adapter cannot be {action}; train one without {name}."
        )

    @property
    def changes_base(self) -> bool:
        """Whether PEFT changes weights of the base when it applies the adapter."""
        kept = self.init is None or isinstance(self.init, bool)
        kept = kept or str(self.init).lower() in _INIT_KEEPS_BASE
        return (
            not kept
            or self.options.get("bias", "none") not in ("none", None)
            or bool(self.options.get("layer_replication"))
        )

    def saves(self, module: str) -> bool:
        """Whether a module was trained whole (modules_to_save)."""
        return any(module.endswith(name) for name in self.modules_to_save)

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B A for a module whose matrices have this rank.

        Raises UserError if rank_pattern or alpha_pattern do not say which one was trained.
        """
        configured = self._by_pattern("rank_pattern", self.rank_pattern, module, self.rank)
        if rank != configured:
            name = "rank_pattern" if self.rank_pattern else "r"
            raise UserError(
                f"{self.path}: {name} does not fit the tensors of {module} (got {configured:g}, "
                f"expected {rank}). PEFT saves overlapping patterns in another order than it "
                "trained with; give each module a pattern of its own."
            )
        alpha = self._by_pattern("alpha_pattern", self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _by_pattern(
        self, option: str, patterns: Mapping[str, float], module: str, default: float
    ) -> float:
        """The value of the pattern that matches the end of a module's name, as in PEFT."""
        found = [v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)]
        if option == "alpha_pattern" and len(set(found)) > 1:
            raise UserError(
                f"{self.path}: {option} has several values for {module} (got "
                f"{', '.join(f'{v:g}' for v in found)}, expected one). PEFT saves patterns in "
                "another order than it trained with; give each module a pattern of its own."
            )
        return found[0] if found else default

    def rows_of(self, module: str) -> list[int]:
        """Ids of the token rows of a module that were trained."""
        for name, indices in self.token_indices.items():
            if module == name or module.endswith("." + name):
                return indices
        raise UserError(
            f"{self.path}: trainable_token_indices lacks an entry for {module}. Copy the file of "
            "this adapter again."
        )


def _wrong(path: Path, name: str, value: Any, expected: str) -> UserError:
    return UserError(f"{path}: Unsupported {name} (got {shown(value)}, expected {expected}).")


def _number(path: Path, name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_SIZE:
        raise _wrong(path, name, value, "a number above 0")
    return float(value)


def _patterns(path: Path, name: str, value: Any) -> dict[str, float]:
    if not isinstance(value or {}, dict):
        raise _wrong(path, name, value, "an object of patterns and numbers")
    found = {}
    for pattern, number in (value or {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise _wrong(path, name, pattern, f"a regular expression; {error}") from error
        found[pattern] = _number(path, f"{name}[{pattern!r}]", number)
    return found


def _token_indices(path: Path, value: Any) -> dict[str, list[int]]:
    by_module = value if isinstance(value, dict) else {"embed_tokens": value or []}
    for indices in by_module.values():
        is_list = isinstance(indices, list)
        if not is_list or not all(type(i) is int and i >= 0 for i in indices):
            raise _wrong(path, "trainable_token_indices", value, "lists of token ids")
    return by_module
