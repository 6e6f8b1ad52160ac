"use strict";
const tip = document.createElement("div");
tip.id = "tip"; tip.hidden = true; document.body.append(tip);
function place(event) {
  const mark = event.target.closest("[data-tip]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 4)) + "px";
  tip.style.top = (event.clientY + box.height + 24 > innerHeight ? event.clientY - box.height - 10 : event.clientY + 16) + "px";
}
addEventListener("pointermove", place);
addEventListener("pointerdown", place);
addEventListener("scroll", () => { tip.hidden = true; }, true);

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, index) => row.cells[index].dataset.v ?? row.cells[index].textContent.trim();
  heads.forEach((head, index) => {
    head.tabIndex = 0;
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a, index), key(b, index)];
        if (x === "" || y === "") return (x === "") - (y === "");  // what has no value stays at the end
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
        return down ? -order : order;
      });
      body.append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
  const search = document.querySelector(`input[data-table="${table.id}"]`);
  search?.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}

const plansShown = document.getElementById("plans-shown");
if (plansShown) {
  const { operators, choices, plans } = JSON.parse(document.getElementById("plans").textContent);
  const picked = [0, plans.length - 1];
  const make = (name, text = "", parent = null) => {
    const element = document.createElement(name);
    element.textContent = text;
    parent?.append(element);
    return element;
  };
  const short = (value) => value == null ? "" : Math.abs(value) < 1e-3 && value ? value.toExponential(2) : String(+value.toPrecision(4));
  const selects = picked.map((plan, side) => {
    const label = make("label", side ? "beside " : "plan ", plansShown);
    const select = make("select", "", label);
    plans.forEach((item, index) => { make("option", item.title, select).value = index; });
    select.addEventListener("change", () => { picked[side] = +select.value; show(); });
    return select;
  });
  const body = make("div", "", plansShown);
  function list(title, paths, parent) {
    if (!paths.length) return;
    const details = make("details", "", parent);
    make("summary", `${paths.length} ${title}`, details);
    const items = make("ul", "", details);
    for (const path of paths) make("code", path, make("li", "", items));
  }
  function show() {
    selects.forEach((select, side) => { select.value = picked[side]; });
    for (const dot of document.querySelectorAll("[data-plan]")) {
      dot.classList.toggle("picked", picked.includes(+dot.dataset.plan));
    }
    body.replaceChildren();
    const shown = picked.map((index) => plans[index]);
    const frame = make("div", "", body);
    frame.className = "scroll";
    const table = make("table", "", frame);
    table.className = "data";
    const row = (head, cells) => {
      const line = make("tr", "", table);
      make("th", head, line).scope = "row";
      for (const cell of cells) make("td", cell, line).className = "num";
    };
    row("", shown.map((plan) => plan.title));
    const figures = { "bits a weight": "average_bits", "predicted": "predicted", "KL at the answer": "kl_answer", "exact match": "exact_match" };
    for (const [title, key] of Object.entries(figures)) row(title, shown.map((plan) => short(plan[key])));
    choices.forEach((choice, place) => {
      row(choice === "leave" ? "left in high precision" : choice, shown.map((plan) => String(plan.of.filter((own) => own === place).length)));
    });
    shown.slice(0, picked[0] === picked[1] ? 1 : 2).forEach((plan) => {
      make("h3", plan.title, body);
      choices.forEach((choice, place) => {
        list(choice === "leave" ? "left in high precision" : `in ${choice}`, operators.filter((_, index) => plan.of[index] === place), body);
      });
      make("code", plan.command, make("pre", "", body));
    });
    const differing = operators.map((path, index) => [path, ...shown.map((plan) => choices[plan.of[index]])]).filter(([, a, b]) => a !== b);
    list("operators differ", differing.map(([path, a, b]) => `${path}: ${a}, ${b}`), body);
  }
  addEventListener("click", (event) => {
    const dot = event.target.closest("[data-plan]");
    if (!dot) return;
    picked[event.shiftKey ? 1 : 0] = +dot.dataset.plan;
    show();
  });
  show();
}
