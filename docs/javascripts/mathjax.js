// Formulas are marked by pymdownx.arithmatex; nothing else is looked at.
window.MathJax = {
  tex: {
    inlineMath: [["\\(", "\\)"]],
    displayMath: [["\\[", "\\]"]],
    processEscapes: true,
    tags: "none",
  },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};
