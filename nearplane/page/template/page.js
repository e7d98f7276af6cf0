// With JavaScript a heat map is one stop of the Tab key, and arrows move within it. Without, every cell is a stop.
for (const map of document.querySelectorAll("svg.map")) {
  const cells = [...map.querySelectorAll(".cell")];
  const at = (cell, name) => Number(cell.firstElementChild.getAttribute(name));
  cells.forEach((cell, i) => cell.setAttribute("tabindex", i ? "-1" : "0"));
  map.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const from = document.activeElement;
    if (!way || !cells.includes(from)) return;
    event.preventDefault();
    let next = null, least = Infinity;
    for (const cell of cells) {
      const dx = at(cell, "x") - at(from, "x"), dy = at(cell, "y") - at(from, "y");
      const along = dx * way[0] + dy * way[1], aside = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
      if (along > 0 && along + 100 * aside < least) [next, least] = [cell, along + 100 * aside];
    }
    if (!next) return;
    from.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });
}
