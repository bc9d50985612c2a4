(() => {
  const EVERY = 3000; // milliseconds between two looks at the server
  // `known` is the server's name, another one after each start; `lost` is set once the library has
  // given up its connection: nothing on the page works any more, but what is shown stays.
  let known = null, away = 0, anew = false, lost = false;
  const fetched = window.fetch.bind(window);
  const later = (wait) => new Promise((resolve) => setTimeout(resolve, wait));
  const talking = () => document.querySelector("[id^=chat-] .message") !== null;

  const say = (text, reload = false) => {
    const place = document.getElementById("gone");
    if (!place || place.dataset.said === text) return;
    place.dataset.said = text;
    place.hidden = !text;
    place.textContent = text;
    if (reload) {
      const button = document.createElement("button");
      button.textContent = "Reload the page";
      button.onclick = () => window.location.reload();
      place.append(" ", button);
    }
  };

  // One look at the server: what it is doing, and whether it is there, and still the same one.
  const look = async () => {
    let told;
    try {
      const answer = await fetched("page/status", { cache: "no-store", signal: AbortSignal.timeout(8000) });
      if (!answer.ok) throw new Error(String(answer.status));
      told = await answer.json();
    } catch {
      away += 1;
      if (away > 1 && !lost) {
        say("The server does not answer. What was said and typed stays here; trying again every " +
            "few seconds.");
      }
      return;
    }
    away = 0;
    anew = anew || (known !== null && told.instance !== known);
    known = known ?? told.instance;
    const line = document.querySelector("#status .status");
    if (line && line.textContent !== told.line) line.textContent = told.line;
    if (anew) {
      say("The server was started anew and does not know this talk any more. What is shown here " +
          "can still be copied; reload the page to go on.", true);
    } else if (lost) {
      say("The connection was lost, and the server has forgotten this talk. What is shown here " +
          "can still be copied; reload the page to go on.", true);
    } else {
      say(told.draining ? "The server is shutting down: what runs may end, nothing new is taken." : "");
    }
  };

  // Events that the server has taken, those whose end it has told, and how many are on their way.
  const taken = new Set(), ended = new Set();
  let underway = 0;
  const waiting = () => [...taken].some((event) => !ended.has(event));

  const join = async (asked, more) => {
    for (let tries = 0; ; tries += 1) {
      if (anew) throw new TypeError("the server was started anew");
      try {
        return await fetched(asked, ...more);
      } catch (fault) {
        if (tries > 20) throw fault;
        await later(EVERY);
        await look();
      }
    }
  };

  // The server closes its stream of news behind the last event that it knows of. Where another one
  // was sent before that was read here, the library would wait for its news for ever: go on reading.
  const unbroken = async (asked, more) => {
    const read = (answer) => answer.body.pipeThrough(new TextDecoderStream()).getReader();
    const first = await fetched(asked, ...more);
    if (!first.ok) return first;
    const encoder = new TextEncoder();
    let reader = read(first), text = "";
    const pull = async (out) => {
      for (;;) {
        const end = text.indexOf("\n\n") + 2;
        if (end < 2) {
          const { done, value } = await reader.read();
          if (done) return out.close();
          text += value;
          continue;
        }
        const news = text.slice(0, end);
        text = text.slice(end);
        const told = news.indexOf("{"); // a proxy may send lines of its own
        const { msg, event_id } = told < 0 ? {} : JSON.parse(news.slice(told));
        if (msg === "process_completed") ended.add(event_id);
        if (msg === "close_stream") {
          while (underway) await later(20);
          const next = waiting() ? await fetched(asked, ...more) : null;
          if (next?.ok) {
            reader = read(next);
            text = "";
            continue;
          }
          taken.clear();
          ended.clear();
        }
        return out.enqueue(encoder.encode(news));
      }
    };
    const { status, headers } = first;
    return new Response(new ReadableStream({ pull, cancel: (why) => reader.cancel(why) }),
                        { status, headers });
  };

  // The library reloads the page, and all that is on it, as soon as a server answers again. Where
  // there is a talk, its reader decides. What is sent while the server is away is sent again.
  window.fetch = async (asked, ...more) => {
    const address = String(asked?.url ?? asked).split("?")[0];
    if (address.endsWith("/app_id") && talking()) {
      lost = true;
      look();
      return new Response("", { status: 503 });
    }
    if (address.endsWith("/queue/data")) return unbroken(asked, more);
    if (!address.endsWith("/queue/join")) return fetched(asked, ...more);
    underway += 1;
    try {
      const answer = await join(asked, more);
      if (answer.ok) taken.add((await answer.clone().json()).event_id);
      return answer;
    } finally {
      underway -= 1;
    }
  };

  setInterval(look, EVERY);
  look();
})();
