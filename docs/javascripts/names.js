// Names that the theme leaves out, for those who hear the page.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
document.querySelectorAll(".md-code__nav").forEach((nav, i) => {
  nav.setAttribute("aria-label", `Code block ${i + 1}`);
});
