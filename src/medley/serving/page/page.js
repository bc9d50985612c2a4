() => {
  // Whether the server is still there, and still the same one: said in words, at the top.
  document.documentElement.lang = "en";
  let known = null, away = 0;
  const say = (text) => {
    const place = document.getElementById("gone");
    if (!place) return;
    place.hidden = !text;
    if (place.textContent !== text) place.textContent = text;
  };
  const look = async () => {
    try {
      const answer = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(8000) });
      const told = await answer.json();
      away = 0;
      if (known && told.instance !== known) {
        say("The server was started anew and does not know this talk any more. What is shown here " +
            "can still be copied; reload the page to go on.");
        return;
      }
      known = told.instance;
      say(told.status === "ok" ? "" :
          "The server is shutting down: what runs may end, nothing new is taken.");
    } catch {
      away += 1;
      if (away > 1) {
        say("The server does not answer. What was said and typed stays here; trying again every " +
            "few seconds.");
      }
    }
  };
  // Names for what the library leaves without one.
  const name = () => {
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
  setInterval(look, 4000);
  look();
}
