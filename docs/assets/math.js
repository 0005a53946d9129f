// Sets the equations that `pymdownx.arithmatex` has marked.
document.querySelectorAll(".arithmatex").forEach((element) => {
  const text = element.textContent;
  katex.render(text.slice(2, -2), element, { displayMode: text.startsWith("\\[") });
});
