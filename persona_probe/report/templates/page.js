(() => {
  "use strict";
  const config = { displayModeBar: false, responsive: true, scrollZoom: false };
  const places = [...document.querySelectorAll("[data-figure]")];
  for (const place of places) {
    const { data, layout } = JSON.parse(document.getElementById(place.dataset.figure).textContent);
    place.style.minHeight = `${layout.height}px`;
    Plotly.newPlot(place, data, layout, config);
  }
  // Figures are drawn for the screen's width; paper is narrower.
  addEventListener("beforeprint", () => {
    for (const place of places) Plotly.relayout(place, { width: place.closest(".pair") ? 310 : 640 });
  });
  addEventListener("afterprint", () => {
    for (const place of places) Plotly.relayout(place, { width: null, autosize: true });
  });
  const button = document.getElementById("open-all");
  if (button) {
    const folds = [...document.querySelectorAll("details.answer")];
    button.hidden = false;
    button.addEventListener("click", () => {
      const opening = folds.some((fold) => !fold.open);
      for (const fold of folds) fold.open = opening;
      button.textContent = opening ? "Close all" : "Open all";
    });
  }
})();
