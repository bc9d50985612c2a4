(() => {
  const INTERVAL = 3000; // milliseconds between two status requests
  const MAX_RETRIES = 20;
  // `instance` identifies the server process. `restarted`: another process answers now. `lost`:
  // Gradio has given up its connection; the page no longer works, but its contents stay visible.
  let instance = null, failures = 0, restarted = false, lost = false;
  const originalFetch = window.fetch.bind(window);
  const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
  const hasConversation = () => document.querySelector("[id^=chat-] .message") !== null;

  const showAlert = (text, withReload = false) => {
    const alert = document.getElementById("alert");
    if (!alert || alert.dataset.text === text) return;
    alert.dataset.text = text;
    alert.hidden = !text;
    alert.textContent = text;
    if (withReload) {
      const button = document.createElement("button");
      button.textContent = "Reload the page";
      button.onclick = () => window.location.reload();
      alert.append(" ", button);
    }
  };

  // Requests the server's status: its load, whether it drains, and whether it was restarted.
  const updateStatus = async () => {
    let status;
    try {
      const response = await originalFetch(
        "ui/status", { cache: "no-store", signal: AbortSignal.timeout(8000) });
      if (!response.ok) throw new Error(String(response.status));
      status = await response.json();
    } catch {
      failures += 1;
      if (failures > 1 && !lost) {
        showAlert("The server does not respond. The conversation and your text stay here. " +
                  "Retrying every few seconds.");
      }
      return;
    }
    failures = 0;
    restarted = restarted || (instance !== null && status.instance !== instance);
    instance = instance ?? status.instance;
    const line = document.querySelector("#server-status .status");
    if (line && line.textContent !== status.line) line.textContent = status.line;
    if (restarted) {
      showAlert("The server was restarted and no longer has this conversation. You can still copy " +
                "it. Reload the page to start a new one.", true);
    } else if (lost) {
      showAlert("The connection was lost, and the server no longer has this conversation. You can " +
                "still copy it. Reload the page to start a new one.", true);
    } else {
      showAlert(status.draining
        ? "The server is shutting down. Running responses can finish; new messages are rejected."
        : "");
    }
  };

  // Events that the server accepted, events that it completed, and number of events being sent.
  const accepted = new Set(), completed = new Set();
  let sending = 0;
  const isWaiting = () => [...accepted].some((event) => !completed.has(event));

  // Sends an event; retries while the server is unreachable.
  const sendEvent = async (resource, options) => {
    for (let attempt = 0; ; attempt += 1) {
      if (restarted) throw new TypeError("the server was restarted");
      try {
        return await originalFetch(resource, ...options);
      } catch (error) {
        if (attempt > MAX_RETRIES) throw error;
        await sleep(INTERVAL);
        await updateStatus();
      }
    }
  };

  // The server closes its message stream after the last event that it has. If the browser sent
  // another event before it read the end of the stream, Gradio would wait for that event's messages
  // forever. This stream opens the next one instead.
  const continuousStream = async (resource, options) => {
    const readerOf = (response) => response.body.pipeThrough(new TextDecoderStream()).getReader();
    const first = await originalFetch(resource, ...options);
    if (!first.ok) return first;
    const encoder = new TextEncoder();
    let reader = readerOf(first), text = "";
    const pull = async (controller) => {
      for (;;) {
        const end = text.indexOf("\n\n") + 2;
        if (end < 2) {
          const { done, value } = await reader.read();
          if (done) return controller.close();
          text += value;
          continue;
        }
        const message = text.slice(0, end);
        text = text.slice(end);
        const json = message.indexOf("{"); // A proxy may insert lines without JSON.
        const { msg, event_id } = json < 0 ? {} : JSON.parse(message.slice(json));
        if (msg === "process_completed") completed.add(event_id);
        if (msg === "close_stream") {
          while (sending) await sleep(20);
          const next = isWaiting() ? await originalFetch(resource, ...options) : null;
          if (next?.ok) {
            reader = readerOf(next);
            text = "";
            continue;
          }
          accepted.clear();
          completed.clear();
        }
        return controller.enqueue(encoder.encode(message));
      }
    };
    const { status, headers } = first;
    return new Response(
      new ReadableStream({ pull, cancel: (reason) => reader.cancel(reason) }), { status, headers });
  };

  // Gradio reloads the page, with all its contents, as soon as a server answers again. With a
  // conversation on the page, the user decides. Events sent while the server is away are repeated.
  window.fetch = async (resource, ...options) => {
    const url = String(resource?.url ?? resource).split("?")[0];
    if (url.endsWith("/app_id") && hasConversation()) {
      lost = true;
      updateStatus();
      return new Response("", { status: 503 });
    }
    if (url.endsWith("/queue/data")) return continuousStream(resource, options);
    if (!url.endsWith("/queue/join")) return originalFetch(resource, ...options);
    sending += 1;
    try {
      const response = await sendEvent(resource, options);
      if (response.ok) accepted.add((await response.clone().json()).event_id);
      return response;
    } finally {
      sending -= 1;
    }
  };

  setInterval(updateStatus, INTERVAL);
  updateStatus();
})();
