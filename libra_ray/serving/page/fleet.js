"use strict";

const PERIOD_MS = 1000;
const PATIENCE_MS = 4000;
const HISTORY_S = 180;
const NONE = "–";

const find = id => document.getElementById(id);

// Everything from outside is set as text, never as markup.
function make(tag, parent, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  parent.append(element);
  return element;
}

function makeSvg(tag, parent, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}

function number(value, unit = "") {
  if (value === null || value === undefined) return NONE;
  const size = Math.abs(value);
  const digits = Number.isInteger(value) || size >= 100 ? 0 : size >= 10 ? 1 : 2;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) + unit;
}

const tails = marks => marks.count ? `p95 ${number(marks.p95)}, p99 ${number(marks.p99)}` : "";

const percent = share => share === null ? NONE : number(100 * share, " %");

function plural(count, word) {
  return `${number(count)} ${word}${count === 1 ? "" : "s"}`;
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${number(seconds / 3600)} h`;
}

// --- key figures

const HEADLINES = {
  robots: ["robots", f => [number(f.robots_connected), plural(f.gateways, "gateway")]],
  success: ["success", f => [percent(f.episodes.success_rate), f.episodes.judged ? `${number(f.episodes.successes)} of ${plural(f.episodes.judged, "episode")}` : "no episode yet"]],
  requests: ["requests per second", f => [number(f.requests_per_s), f.batch_size.count ? `${plural(f.batch_size.p50, "robot")} a batch` : ""]],
  latency: ["latency", f => [number(f.latency_ms.p50, " ms"), tails(f.latency_ms)]],
  missed: ["deadline misses", f => [percent(f.missed.share), `${number(f.missed.count)} in ${f.window_s} s`, f.missed.share >= 0.01]],
  held: ["held actions", f => [percent(f.held.share), `${number(f.held.count)} in ${f.window_s} s`, f.held.share >= 0.01]],
};

function buildHeadlines() {
  for (const [id, [label]] of Object.entries(HEADLINES)) {
    const card = make("div", find("headlines"), "card");
    card.id = `figure-${id}`;
    make("div", card, "label", label);
    make("div", card, "value", NONE);
    make("div", card, "note");
  }
}

function showHeadlines(fleet) {
  for (const [id, [, read]] of Object.entries(HEADLINES)) {
    const [value, note, alarm] = read(fleet);
    const card = find(`figure-${id}`);
    card.classList.toggle("alarm", Boolean(alarm));
    card.children[1].textContent = value;
    card.children[2].textContent = note;
  }
}

// --- curves

const CURVES = {
  latency: ["Latency", " ms", { p50: ["main", point => point.latency_p50_ms], p99: ["tail", point => point.latency_p99_ms] }],
  requests: ["Requests per second", "", { now: ["main", point => point.requests_per_s] }],
};

// One line per level; the page learns their names from the server.
function addLevelCurves(levels) {
  const lines = (key, names) => Object.fromEntries(names.map(name =>
    [name, [`level-${levels.findIndex(level => level.name === name) % 4}`, point => point.levels[name]?.[key] ?? null]]));
  const upper = levels.slice(0, -1).map(level => level.name);
  delete CURVES.age;
  if (upper.length) CURVES.age = ["Age of the intent, steps, p50", "", lines("intent_age_p50", upper)];
  CURVES.calls = ["Calls, p50", " ms", lines("call_p50_ms", levels.map(level => level.name))];
}

function buildCurves() {
  find("curves").replaceChildren();
  for (const [id, [title, , lines]] of Object.entries(CURVES)) {
    const card = make("figure", find("curves"), "card");
    card.id = `curve-${id}`;
    make("h2", card, "", title);
    const legend = make("div", card, "legend");
    const plot = make("div", card, "plot");
    const svg = makeSvg("svg", plot, { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" });
    make("span", plot);
    for (const [label, [kind]] of Object.entries(lines)) {
      make("b", make("span", legend, kind, `${label} `));
      makeSvg("path", svg, { class: kind });
    }
  }
}

function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 1.5, 2, 3, 4, 5, 7.5, 10].find(step => step * power >= value * 0.999);
}

function pathOf(history, read, top) {
  let path = "";
  let pen = "M";
  for (const point of history) {
    const x = 100 * (1 - point.seconds_ago / HISTORY_S);
    if (read(point) === null || x < 0) { pen = "M"; continue; }
    path += `${pen}${x.toFixed(2)} ${(100 - 100 * read(point) / top).toFixed(2)}`;
    pen = "L";
  }
  return path;
}

function showCurves(fleet) {
  const last = fleet.history.at(-1);
  for (const [id, [title, unit, lines]] of Object.entries(CURVES)) {
    const card = find(`curve-${id}`);
    const reads = Object.values(lines).map(([, read]) => read);
    const highest = Math.max(0, ...fleet.history.flatMap(point => reads.map(read => read(point) ?? 0)));
    const top = highest > 0 ? ceiling(highest) : 1;
    card.querySelector(".plot span").textContent = highest > 0 ? number(top, unit) : "";
    const words = Object.keys(lines).map((label, index) => {
      const now = number(last ? reads[index](last) : null, unit);
      card.querySelectorAll("b")[index].textContent = now;
      card.querySelectorAll("path")[index].setAttribute("d", pathOf(fleet.history, reads[index], top));
      return `${label} ${now}`;
    });
    card.querySelector("svg").setAttribute("aria-label", `${title}, last three minutes; at present ${words.join(", ")}`);
  }
}

// --- levels and refusals

const marks = (found, unit = "") => found.count ? [found.p50, found.p95, found.p99].map(value => number(value)).join(" / ") + unit : NONE;

const LEVEL_ROWS = {
  "call, p50 / 95 / 99": level => marks(level.call_ms, " ms"),
  "robots a call": level => number(level.batch_size.mean),
  waiting: level => number(level.queue.mean),
  "picture to intent": level => marks(level.intent_ready_ms, " ms"),
  "to spare": level => level.margin ? `${number(level.margin.steps)} of ${plural(level.margin.covers, "step")}` : NONE,
  "intent's age": level => marks(level.intent_age_steps, " steps"),
  "a re-plan changes": level => level.replan_share.count ? `${percent(level.replan_share.mean)}, p95 ${percent(level.replan_share.p95)}` : NONE,
  "by, p50 / 95 / 99": level => marks(level.replan_difference),
};

let shownLevels = null;

function buildLevels(levels) {
  addLevelCurves(levels);
  buildCurves();
  find("levels").replaceChildren();
  for (const [index, level] of levels.entries()) {
    const card = make("div", find("levels"), "card");
    make("h3", card, `level-${index % 4}`, level.name);
    for (const label of Object.keys(LEVEL_ROWS)) {
      const pair = make("div", card, "pair");
      make("span", pair, "", label);
      make("b", pair);
    }
  }
}

function showLevels(fleet) {
  const names = JSON.stringify(fleet.levels.map(level => level.name));
  if (names !== shownLevels) buildLevels(fleet.levels);
  shownLevels = names;
  find("window").textContent = `last ${fleet.window_s} s`;
  fleet.levels.forEach((level, index) => {
    const cells = find("levels").children[index].querySelectorAll("b");
    Object.values(LEVEL_ROWS).forEach((read, row) => { cells[row].textContent = read(level); });
    find("levels").children[index].classList.toggle("late", Boolean(level.margin && level.margin.steps < 0));
  });
  const late = fleet.levels.filter(level => level.margin && level.margin.steps < 0);
  find("late").textContent = late.map(level => `Too late: ${level.margin.text}.`).join(" ");
  const reasons = Object.entries(fleet.refused).sort((a, b) => b[1] - a[1]).map(([reason, count]) => `${reason} ${number(count)}`);
  find("refused").textContent = reasons.length ? `Refused requests since the start: ${reasons.join(", ")}` : "";
}

// --- robots

const tiles = new Map();

function buildTile(name) {
  const tile = document.createElement("li");
  make("span", tile, "name", name).title = name;
  make("span", tile, "told");
  for (const label of ["latency", "intent", "success"]) {
    const pair = make("div", tile, "pair");
    make("span", pair, "", label);
    make("b", pair);
  }
  makeSvg("rect", makeSvg("svg", tile, { viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" }), { height: 4 });
  return tile;
}

function showTile(tile, robot) {
  tile.className = robot.connected ? robot.holding ? "holding" : "" : "away";
  const steps = robot.intent_age_steps;
  const intent = robot.holding ? "holding" : steps === null ? NONE : plural(steps, "step");
  const success = robot.judged ? `${number(robot.successes)} of ${number(robot.judged)}` : NONE;
  const [latency, age, episodes] = tile.querySelectorAll("b");
  latency.previousSibling.textContent = robot.connected ? "latency" : "left";
  latency.textContent = robot.connected ? number(robot.latency_ms, " ms") : `${duration(robot.silent_s)} ago`;
  age.textContent = intent;
  episodes.textContent = success;
  const told = Object.entries(robot.metadata).map(([name, said]) => `${name}: ${[said].flat().join(", ")}`).join("; ");
  tile.querySelector(".told").textContent = tile.querySelector(".told").title = told;
  tile.querySelector("rect").setAttribute("width", 100 * (robot.success_rate ?? 0));
  tile.title = `${plural(robot.requests, "request")}, ${number(robot.held)} held, ${number(robot.missed)} late; `
    + `here for ${duration(robot.connected_s)}, last heard of ${duration(robot.silent_s)} ago`;
}

function showRobots(fleet) {
  const list = find("robots");
  const names = new Set(fleet.robots.map(robot => robot.name));
  for (const [name, tile] of tiles) {
    if (!names.has(name)) { tile.remove(); tiles.delete(name); }
  }
  fleet.robots.forEach((robot, index) => {
    if (!tiles.has(robot.name)) tiles.set(robot.name, buildTile(robot.name));
    const tile = tiles.get(robot.name);
    showTile(tile, robot);
    if (list.children[index] !== tile) list.insertBefore(tile, list.children[index] ?? null);
  });
  find("robot-count").textContent = fleet.robots.length ? `${number(fleet.robots_connected)} connected` : "";
  find("nobody").hidden = fleet.robots.length > 0;
  find("not-listed").textContent = fleet.robots_not_listed ? `and ${plural(fleet.robots_not_listed, "more robot")}` : "";
}

// --- asking

// By the page's own clock, which nobody sets; times of day are only shown.
let answeredAt = null;
let answeredAtTime = "";
const openedAt = performance.now();

function show(fleet) {
  showHeadlines(fleet);
  showLevels(fleet);
  showCurves(fleet);
  showRobots(fleet);
  answeredAt = performance.now();
  answeredAtTime = new Date().toLocaleTimeString("en-GB");
  document.body.className = "";
  find("notice").hidden = true;
  find("state").textContent = `live, ${new Date(fleet.time * 1000).toLocaleTimeString("en-GB")}`;
}

function lament(problem) {
  if (performance.now() - (answeredAt ?? openedAt) < PATIENCE_MS) return;
  document.body.className = answeredAt === null ? "gone waiting" : "gone";
  const since = answeredAt === null ? "" : ` since ${answeredAtTime}; what stands below is from then`;
  find("notice").textContent = `No answer from the server${since}. Asking again every second. (${problem})`;
  find("notice").hidden = false;
  find("state").textContent = "no connection";
}

async function ask() {
  try {
    const answer = await fetch("fleet.json", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
  } catch (problem) {
    lament(problem.message);
  }
  setTimeout(ask, PERIOD_MS);
}

find("address").textContent = location.origin.replace(/^http/, "ws");
buildHeadlines();
ask();
