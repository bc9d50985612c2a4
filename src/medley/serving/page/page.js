() => {
  document.documentElement.lang = "en";
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

  // The library reloads the page, and all that is on it, as soon as a server answers again. Where
  // there is a talk, its reader decides. What is sent while the server is away is sent again.
  window.fetch = async (asked, ...more) => {
    const address = String(asked?.url ?? asked).split("?")[0];
    if (address.endsWith("/app_id") && talking()) {
      lost = true;
      look();
      return new Response("", { status: 503 });
    }
    if (!address.endsWith("/queue/join")) return fetched(asked, ...more);
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

  // Names for what the library leaves without one. What is told of an answer is read out as it
  // changes: its place has to be known before.
  const name = () => {
    for (const line of document.querySelectorAll("[id^=line-]:not([role])")) {
      line.setAttribute("role", "status");
    }
    document.querySelector("#box textarea")?.setAttribute("aria-label", "Your message");
    for (const [who, text] of [["user", "Picture that you sent"],
                               ["bot", "Picture drawn by the model"]]) {
      for (const image of document.querySelectorAll(`[id^=chat-] .${who} img:not([alt^=Picture])`)) {
        image.alt = text;
        image.closest("button")?.setAttribute("aria-label", `${text}: look at it closely`);
      }
    }
  };
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
  setInterval(look, EVERY);
  look();
}
