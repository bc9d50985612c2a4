() => {
  document.documentElement.lang = "en";

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
}
