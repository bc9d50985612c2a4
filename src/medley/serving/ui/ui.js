() => {
  document.documentElement.lang = "en";

  // Accessible names that Gradio leaves out. Screen readers announce a note as it changes; they
  // need its role before the first change.
  const label = () => {
    for (const note of document.querySelectorAll("[id^=note-]:not([role])")) {
      note.setAttribute("role", "status");
    }
    document.querySelector("#message textarea")?.setAttribute("aria-label", "Your message");
    for (const [role, text] of [["user", "Uploaded image"], ["bot", "Generated image"]]) {
      for (const image of document.querySelectorAll(`[id^=chat-] .${role} img:not([alt="${text}"])`)) {
        image.alt = text;
        image.closest("button")?.setAttribute("aria-label", `${text}: enlarge`);
      }
    }
  };
  new MutationObserver(label).observe(document.body, { childList: true, subtree: true });
  label();
}
