// The values of the table below each chart, shown beside the cell under the pointer or reached by arrow keys.
(() => {
  const [tip, mark, said] = ["tip", "mark", "said"].map((id) => document.getElementById(id));
  const hide = () => { tip.hidden = mark.hidden = true; };
  const show = ({ path, text }) => {
    const box = path.getBoundingClientRect();
    tip.hidden = mark.hidden = false;
    tip.textContent = text;
    const left = Math.min(box.right + 6, document.documentElement.clientWidth - tip.offsetWidth - 4);
    tip.style.left = `${Math.max(4, left) + scrollX}px`;
    tip.style.top = `${box.bottom + 6 + scrollY}px`;
    for (const side of ["left", "top"]) mark.style[side] = `${box[side] + (side === "left" ? scrollX : scrollY)}px`;
    for (const size of ["width", "height"]) mark.style[size] = `${box[size]}px`;
  };
  const line = (name) => (name === "before" || name === "after" ? `${name} the layers` : `layer ${name}`);
  const cellsOf = (figure) => {
    const paths = figure.querySelectorAll(".cells path");
    const heads = [...figure.querySelectorAll("thead th")].slice(1).map((head) => head.textContent);
    const cells = [];
    figure.querySelectorAll("tbody tr").forEach((row, y) => [...row.cells].slice(1).forEach((cell, x) => {
      if (!cell.textContent) return;
      const text = `${line(row.cells[0].textContent)} · ${heads[x]}\n${cell.textContent}`;
      cells.push({ path: paths[cells.length], x, y, text });
    }));
    return cells;
  };
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  // The next cell in a direction: in the same row or column if there is one, else the nearest beyond it.
  const next = (cells, from, [dx, dy]) => {
    const far = ({ x, y }) => (x - from.x) * dx + (y - from.y) * dy;
    const aside = ({ x, y }) => Math.abs((x - from.x) * dy) + Math.abs((y - from.y) * dx);
    const rank = (cell) => (aside(cell) ? 1e6 : 0) + far(cell) * 1e3 + aside(cell);
    return cells.filter((cell) => far(cell) > 0).sort((a, b) => rank(a) - rank(b))[0] || from;
  };
  for (const figure of document.querySelectorAll("figure")) {
    const plot = figure.querySelector(".plot");
    const cells = cellsOf(figure);
    let at = cells[0];
    const read = (cell) => {
      at = cell;
      at.path.scrollIntoView({ block: "nearest", inline: "nearest" });
      show(at);
      said.textContent = at.text;
    };
    for (const cell of cells) cell.path.addEventListener("pointerenter", () => show(cell));
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("scroll", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) read(at); });
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hide();
      if (!(event.key in steps)) return;
      event.preventDefault();
      read(next(cells, at, steps[event.key]));
    });
  }
})();
