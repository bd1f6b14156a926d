/* Values of a chart's lines at the pointer, or at a position that the arrow keys move. */
const { axis, box: [LEFT, RIGHT, TOP, BOTTOM], charts } = JSON.parse(byId("data").textContent);
const values = byId("values");
const COLORS = 6;

const format = (value) => (value === null ? "–" : Number(value.toPrecision(5)).toLocaleString("en", { maximumSignificantDigits: 5 }));

/** Return the index of the entry of a sorted array that is nearest to a value. */
function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle;
    else high = middle;
  }
  return Math.abs(sorted[low] - value) <= Math.abs(sorted[high] - value) ? low : high;
}

/** Show the values at a position on the x axis. */
function show(svg, chart, wanted) {
  const [low, high] = chart.x;
  const reference = chart.lines.reduce((best, line) => (line.x.length > best.length ? line.x : best), []);
  const x = reference[nearest(reference, wanted)];
  svg.position = x;
  const at = LEFT + ((RIGHT - LEFT) * (x - low)) / (high - low);
  svg.cursorLine ??= svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  svg.cursorLine.setAttribute("class", "cursor");
  svg.cursorLine.setAttribute("d", `M${at} ${TOP}V${BOTTOM}`);
  const table = element("table");
  chart.lines.forEach((line) => {
    const place = nearest(line.x, x);
    const row = table.insertRow(), title = element("th");
    title.append(element("i", `c${line.number % COLORS}`), line.label);
    row.append(title, element("td", "", format(line.y[place])));
    if (line.x[place] !== x) row.append(element("td", "", `at ${line.x[place].toLocaleString("en")}`));
  });
  values.replaceChildren(element("div", "", `${x.toLocaleString("en")} ${axis}`), table);
  values.hidden = false;
  const box = svg.getBoundingClientRect(), size = values.getBoundingClientRect();
  const pixel = box.left + (at * box.width) / svg.viewBox.baseVal.width;
  const left = pixel + 12 + size.width > innerWidth ? pixel - 12 - size.width : pixel + 12;
  values.style.left = `${Math.max(4, left)}px`;
  values.style.top = `${Math.max(4, Math.min(box.top + 10, innerHeight - size.height - 4))}px`;
}

function hide(svg) {
  values.hidden = true;
  svg.cursorLine?.remove();
  svg.cursorLine = null;
}

document.querySelectorAll(".chart > svg").forEach((svg, number) => {
  const chart = charts[number];
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) * svg.viewBox.baseVal.width) / box.width;
    show(svg, chart, chart.x[0] + ((chart.x[1] - chart.x[0]) * (at - LEFT)) / (RIGHT - LEFT));
  });
  svg.addEventListener("pointerleave", () => hide(svg));
  svg.addEventListener("blur", () => hide(svg));
  svg.addEventListener("keydown", (event) => {
    const direction = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!direction) return;
    event.preventDefault();
    const longest = chart.lines.reduce((best, line) => (line.x.length > best.length ? line.x : best), []);
    const place = svg.position === undefined ? -direction : nearest(longest, svg.position);
    show(svg, chart, longest[Math.max(0, Math.min(longest.length - 1, place + direction))]);
  });
});
