// Reading values off the curves, and finding a run in all of them. The page is complete without this.
"use strict";

const WIDTH = 560;

function show(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

// Of one line: its data, and where its points are in the drawing.
function readLine(group) {
  const numbers = (text) => text.trim().split(/\s+/).map(Number);
  const points = group.querySelector("polyline").getAttribute("points").trim().split(/\s+/);
  return {
    group,
    places: points.map((point) => Number(point.split(",")[0])),
    epochs: numbers(group.dataset.epochs),
    values: numbers(group.dataset.values),
  };
}

function nearest(places, x) {
  return places.reduce((best, place, i) => (Math.abs(place - x) < Math.abs(places[best] - x) ? i : best), 0);
}

function describe(line, i) {
  const row = show("div", [...line.group.classList].find((name) => /^c\d$/.test(name)), "");
  const place = `${line.group.dataset.run} ${line.group.dataset.name}`;
  row.append(show("i", "", ""), show("span", "", place), show("span", "", line.values[i].toPrecision(4)));
  return row;
}

for (const chart of document.querySelectorAll(".chart")) {
  const drawing = chart.querySelector("svg");
  const rule = chart.querySelector(".rule");
  const lines = [...chart.querySelectorAll(".line")].map(readLine);
  let readout = null;
  const close = () => {
    chart.classList.remove("read");
    if (readout) readout.remove();
    readout = null;
  };
  drawing.addEventListener("pointerleave", close);
  drawing.addEventListener("pointermove", (event) => {
    close();
    const box = drawing.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    const all = lines.flatMap((line) => line.places);
    const at = all[nearest(all, x)];
    rule.setAttribute("x1", at);
    rule.setAttribute("x2", at);
    chart.classList.add("read");
    const met = lines.map((line) => [line, nearest(line.places, at)]);
    const near = met.filter(([line, i]) => Math.abs(line.places[i] - at) < 12);
    const unit = drawing.querySelector(".unit").textContent;
    readout = show("div", "readout", "");
    readout.append(show("small", "", `${Number(near[0][0].epochs[near[0][1]].toPrecision(4))} ${unit}`));
    readout.append(...near.map(([line, i]) => describe(line, i)));
    readout.style[at > WIDTH / 2 ? "left" : "right"] = "12%";
    chart.append(readout);
  });
}

for (const source of document.querySelectorAll(".run[data-run], tr[data-run]")) {
  const others = [...document.querySelectorAll(".line, .phases > [data-run]")].filter(
    (element) => element.dataset.run !== source.dataset.run,
  );
  source.addEventListener("pointerenter", () => others.forEach((element) => element.classList.add("dim")));
  source.addEventListener("pointerleave", () => others.forEach((element) => element.classList.remove("dim")));
}
