// The figure of depthutil.explorer: the law  L = c_m/m^α_m + c_ℓ/ℓ^α_ℓ + c_D/D^α_D + L_0
// and the runs it is fitted to, with every parameter on a slider. Plain JavaScript, no library.
//
// A coefficient such as c_D is a loss at D = 1, far outside the data, and moves by orders of
// magnitude when its exponent moves. So the law is kept in a vector that stays tame,
//   θ = [log T_m, log T_ℓ, log T_D, α_m, α_ℓ, α_D, L_0],
// where T is a term's size in nats at the middle (geometric mean) of the runs.
"use strict";

const NAMES = ["c_width", "c_depth", "c_data", "alpha_width", "alpha_depth", "alpha_data", "L0"];
const SYMBOLS = [["c", "m"], ["c", "ℓ"], ["c", "D"], ["α", "m"], ["α", "ℓ"], ["α", "D"], ["L", "0"]];
const WIDTH = 0, DEPTH = 1, DATA = 2, L0 = 6;
const isCoefficient = (k) => k < 3;
const isExponent = (k) => k >= 3 && k < 6;

// ---------------------------------------------------------------- the law and its fit

const range = (n, from, to) => Array.from({ length: n }, (_, i) => from + ((to - from) * i) / (n - 1));

function prepare(runs) {
  const logs = [runs.width, runs.depth, runs.tokens].map((column) => column.map(Math.log));
  const middle = logs.map((x) => x.reduce((a, b) => a + b) / x.length);
  const centred = logs.map((x, j) => x.map((v) => v - middle[j]));
  return { n: runs.loss.length, x: centred, y: runs.loss.map(Math.log), middle };
}

const toTheta = (params, data) => NAMES.map((name, k) =>
  isCoefficient(k) ? Math.log(params[name]) - params[NAMES[k + 3]] * data.middle[k] : params[name]);
const logCoefficient = (theta, j, data) => theta[j] + theta[j + 3] * data.middle[j];
const term = (theta, j, x) => Math.exp(theta[j] - theta[j + 3] * x); // x: log size from the middle

function residuals(theta, data) {
  const out = new Array(data.n);
  for (let i = 0; i < data.n; i++) {
    let loss = theta[L0];
    for (let j = 0; j < 3; j++) loss += term(theta, j, data.x[j][i]);
    out[i] = data.y[i] - Math.log(loss); // NaN where the law is negative: never an improvement
  }
  return out;
}

const objective = (theta, data) =>
  (100 * residuals(theta, data).reduce((sum, r) => sum + r * r, 0)) / data.n;

function solve(A, b) { // Gaussian elimination with pivoting; at most 7 unknowns
  const M = A.map((row, i) => [...row, b[i]]), n = b.length;
  for (let c = 0; c < n; c++) {
    let p = c;
    for (let r = c + 1; r < n; r++) if (Math.abs(M[r][c]) > Math.abs(M[p][c])) p = r;
    [M[c], M[p]] = [M[p], M[c]];
    for (let r = c + 1; r < n; r++) {
      const f = M[r][c] / M[c][c];
      for (let k = c; k <= n; k++) M[r][k] -= f * M[c][k];
    }
  }
  const s = new Array(n);
  for (let r = n - 1; r >= 0; r--) {
    s[r] = M[r][n];
    for (let k = r + 1; k < n; k++) s[r] -= M[r][k] * s[k];
    s[r] /= M[r][r];
  }
  return s;
}

// Levenberg-Marquardt on the log errors, with one coordinate of θ (or a coefficient) held.
// Holding c is not holding T: with c held, moving the exponent by δ moves log T by −δ · middle,
// which adds to the exponent's column of the Jacobian.
function refit(start, held, data) {
  const free = NAMES.map((_, k) => k).filter((k) => k !== held);
  const move = (theta, step) => {
    const next = [...theta];
    free.forEach((k, q) => { next[k] += step[q]; });
    if (isCoefficient(held)) next[held] -= (next[held + 3] - theta[held + 3]) * data.middle[held];
    return next;
  };
  let theta = [...start], cost = objective(theta, data), damping = 1e-3;
  for (let round = 0; round < 300 && damping < 1e10; round++) {
    const A = free.map(() => new Array(free.length).fill(0)), g = new Array(free.length).fill(0);
    const r = residuals(theta, data);
    for (let i = 0; i < data.n; i++) {
      const row = new Array(7).fill(1), loss = Math.exp(data.y[i] - r[i]);
      for (let j = 0; j < 3; j++) {
        row[j] = term(theta, j, data.x[j][i]);
        row[j + 3] = -row[j] * (data.x[j][i] + (j === held ? data.middle[j] : 0));
      }
      for (let p = 0; p < free.length; p++) {
        const dp = row[free[p]] / loss;
        g[p] += dp * r[i];
        for (let q = 0; q <= p; q++) A[p][q] += (dp * row[free[q]]) / loss;
      }
    }
    for (let p = 0; p < free.length; p++) for (let q = 0; q < p; q++) A[q][p] = A[p][q];
    let gain = 0;
    while (damping < 1e10 && !gain) {
      const damped = A.map((row, p) => row.map((v, q) => p === q ? v * (1 + damping) + 1e-12 : v));
      const next = move(theta, solve(damped, g)), nextCost = objective(next, data);
      if (nextCost < cost && Math.min(next[3], next[4], next[5]) > 0) { // no term may grow with size
        gain = 1 - nextCost / cost;
        [theta, cost, damping] = [next, nextCost, Math.max(damping / 10, 1e-12)];
      } else damping *= 10;
    }
    if (gain < 1e-12) break;
  }
  return theta;
}

// Set one parameter (a coefficient by its logarithm), its term either free or kept at its size in
// the middle of the runs. To keep it, an exponent takes its coefficient along, and the reverse.
function withParameter(theta, k, value, keepTerm, data) {
  const next = [...theta], j = k % 3;
  if (k === L0 || (isExponent(k) && keepTerm)) next[k] = value;
  else if (isExponent(k)) {
    next[k] = value;
    next[j] -= (value - theta[k]) * data.middle[j];
  } else if (keepTerm) next[j + 3] = (value - theta[j]) / data.middle[j];
  else next[j] = value - theta[j + 3] * data.middle[j];
  return next;
}
const getParameter = (theta, k, data) => isCoefficient(k) ? logCoefficient(theta, k, data) : theta[k];

// The best law at each of many values of parameter k, found from the best fit outwards so that
// every fit starts beside its solution.
function profile(best, k, low, high, data) {
  const walk = (values) => {
    let theta = best;
    return values.map((v) => (theta = refit(withParameter(theta, k, v, true, data), k, data)));
  };
  const start = getParameter(best, k, data);
  return [...walk(range(25, start, low)).reverse(), ...walk(range(25, start, high)).slice(1)];
}

// The other parameters follow: from the nearest law of the profile, so that one value of the
// slider is one law, however the reader came there.
function follow(laws, k, value, data) {
  const distance = (theta) => Math.abs(getParameter(theta, k, data) - value);
  const nearest = laws.reduce((a, b) => (distance(b) < distance(a) ? b : a));
  return refit(withParameter(nearest, k, value, true, data), k, data);
}

// At N = 12 m²ℓ the two terms are exponentials in log ℓ, one rising, one falling: where their
// slopes cancel is a closed form.
function optimalShape(theta, N, data) {
  const [am, al] = [theta[WIDTH + 3], theta[DEPTH + 3]];
  const logs = Math.log((2 * al) / am) + logCoefficient(theta, DEPTH, data)
    - logCoefficient(theta, WIDTH, data) + (am / 2) * Math.log(N / 12);
  const depth = Math.exp(logs / (am / 2 + al));
  return { depth, width: Math.sqrt(N / 12 / depth) };
}

// ---------------------------------------------------------------- drawing

const BOX = { w: 380, h: 252, left: 50, right: 14, top: 26, bottom: 36 };
const superscript = (n) => String(n).replace(/[-\d]/g, (d) => d === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]);
const inSvg = (k) => `<tspan font-style="italic">${SYMBOLS[k][0]}</tspan>`
  + `<tspan dy="3" font-size="9">${SYMBOLS[k][1]}</tspan><tspan dy="-3">\u200b</tspan>`;

const inHtml = (k) => `<i>${SYMBOLS[k][0]}</i><sub>${SYMBOLS[k][1]}</sub>`;

function number(v, digits = 3) {
  if (v >= 1e-3 && v < 1e5) return String(+v.toPrecision(digits));
  const power = Math.floor(Math.log10(v));
  return `${(v / 10 ** power).toFixed(1)} × 10${superscript(power)}`;
}

function scale(from, to, lo, hi, log = false) {
  const f = log ? Math.log : (v) => v;
  const at = (v) => lo + ((f(v) - f(from)) / (f(to) - f(from))) * (hi - lo);
  return Object.assign(at, { from, to });
}
const xScale = (from, to, log) => scale(from, to, BOX.left, BOX.w - BOX.right, log);
const yScale = (from, to) => scale(from, to, BOX.h - BOX.bottom, BOX.top);

function ticks(from, to, count) {
  const raw = (to - from) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((s) => s * unit).find((s) => s >= raw);
  const first = Math.ceil(from / step - 1e-9), last = Math.floor(to / step + 1e-9);
  return range(last - first + 1, first, last).map((i) => +(i * step).toPrecision(8))
    .filter(Number.isFinite);
}

// Far outside the panel a point is drawn just outside it: numbers of 1e300 upset some browsers.
const clip = (v) => Math.min(Math.max(v, -999), 999).toFixed(1);
const path = (x, y, points) => "M" + points.map(([a, b]) => `${clip(x(a))} ${clip(y(b))}`).join("L");
const dots = (x, y, points) =>
  `<path class="dots" d="${points.map(([a, b]) => `M${clip(x(a))} ${clip(y(b))}h0`).join("")}"/>`;

function draw(svg, { x, y, xTicks, yTicks, xLabel, yLabel, format = String, body, over = "" }) {
  const base = BOX.h - BOX.bottom, right = BOX.w - BOX.right;
  const inner = `x="${BOX.left}" y="${BOX.top}" width="${right - BOX.left}" height="${base - BOX.top}"`;
  svg.innerHTML = yTicks.map((v) =>
    `<path class="grid" d="M${BOX.left} ${y(v).toFixed(1)}H${right}"/>`
    + `<text x="${BOX.left - 6}" y="${y(v) + 4}" text-anchor="end">${format(v)}</text>`).join("")
    // A nested svg clips its content to the axes without needing an id.
    + `<svg ${inner} viewBox="${inner.match(/[\d.]+/g).join(" ")}">${body}</svg>`
    + `<path class="axis" d="M${BOX.left} ${base}H${right}"/>`
    + xTicks.map((v) => `<path class="axis" d="M${x(v).toFixed(1)} ${base}v4"/>`
      + `<text x="${x(v)}" y="${base + 16}" text-anchor="middle">${v}</text>`).join("")
    + `<text class="name" x="${right}" y="${BOX.h - 5}" text-anchor="end">${xLabel}</text>`
    + `<text class="name" x="2" y="12">${yLabel}</text>${over}`;
}

// ---------------------------------------------------------------- the figure

function lawExplorer(root, { params, runs }) {
  const data = prepare(runs), best = toTheta(params, data), bestObjective = objective(best, data);
  const $ = (selector) => root.querySelector(selector);
  const sliders = NAMES.map((name) => $(`[data-param="${name}"]`));
  const mode = () => $("input[type=radio]:checked").value;
  const say = (name, text) => { $(`output[data-output="${name}"]`).innerHTML = text; };
  let theta = best, moved = DEPTH + 3;
  const profiles = {};

  // A coefficient's slider counts decades from the best fit, the others their own value.
  const bestLog = [0, 1, 2].map((j) => logCoefficient(best, j, data));
  const fromSlider = (k, v) => isCoefficient(k) ? bestLog[k] + v * Math.LN10 : v;
  const toSlider = (k, v) => isCoefficient(k) ? (v - bestLog[k]) / Math.LN10 : v;

  // The runs' own shapes: width as a power of depth, by least squares on logarithms.
  const dot = (a, b) => a.reduce((sum, v, i) => sum + v * b[i], 0);
  const slope = dot(data.x[WIDTH], data.x[DEPTH]) / dot(data.x[DEPTH], data.x[DEPTH]);
  const depths = [Math.min(...runs.depth) * 0.92, Math.max(...runs.depth) * 1.06];
  const stack = (t, depth) => { // L_0, then data, width, depth on top of each other
    const x = Math.log(depth) - data.middle[DEPTH];
    const levels = [t[L0], term(t, DATA, 0), term(t, WIDTH, slope * x), term(t, DEPTH, x)];
    return levels.map((_, i) => levels.slice(0, i + 1).reduce((a, b) => a + b));
  };
  const bestTop = stack(best, depths[0])[3];

  function drawTerms(errors) {
    const x = xScale(...depths, true);
    const y = yScale(best[L0] - 0.2 * (bestTop - best[L0]), bestTop + 0.08 * (bestTop - best[L0]));
    const grid = range(60, Math.log(depths[0]), Math.log(depths[1])).map(Math.exp);
    const level = (t, i) => grid.map((d) => [d, i < 0 ? y.from - 9 : stack(t, d)[i]]);
    const kind = ["rest", "data", "width", "depth"], label = ["L₀, irreducible", "data", "width"];
    const bands = kind.map((name, i) => `<path class="band ${name}" d="`
      + `${path(x, y, level(theta, i))}${path(x, y, level(theta, i - 1).reverse()).replace("M", "L")}Z"/>`);
    const at = depths[0] * 1.035, levels = [y.from, ...stack(theta, at)];
    const names = label.map((text, i) => { // where the band is thick enough to hold its name
      const [lo, hi] = [y(Math.max(levels[i], y.from)), y(Math.min(levels[i + 1], y.to))];
      return lo - hi > 12 ? `<text class="inside" x="${x(at)}" y="${(lo + hi) / 2 + 4}">${text}</text>` : "";
    });
    const pin = x(depths[0] * 1.3), tip = y(stack(theta, depths[0] * 1.3)[3]); // the top band slopes too much
    names.push(`<path d="M${pin} ${tip + 6}L${pin + 7} ${tip - 16}"/>`
      + `<text class="inside" x="${pin + 5}" y="${tip - 19}">depth</text>`);
    // Each run keeps its relative error and is moved to the curve's width and tokens.
    const points = runs.depth.map((d, i) => [d, stack(theta, d)[3] * Math.exp(errors[i])]);
    draw($(".terms svg"), {
      x, y, xTicks: [4, 8, 12, 16, 24, 32, 48, 64, 96].filter((t) => t >= x.from && t <= x.to),
      yTicks: ticks(y.from, y.to, 5), xLabel: "depth ℓ (layers), with the runs’ typical width",
      yLabel: "loss (nats per token)", format: (v) => v.toFixed(1),
      body: bands.join("") + dots(x, y, points)
        + `<path class="law-curve" d="${path(x, y, level(theta, 3))}"/>`
        + [2, 3].map((i) => `<path class="ghost" d="${path(x, y, level(best, i))}"/>`).join("")
        + names.join(""),
    });
  }

  const lawsAlong = (k) => (profiles[k] ??=
    profile(best, k, fromSlider(k, +sliders[k].min), fromSlider(k, +sliders[k].max), data));

  // Likelihood ratio of one parameter: n log(objective / best) against χ²(1) at 95 %.
  const limit = bestObjective * Math.exp(3.841 / data.n);

  function drawObjective(now) {
    const [lo, hi] = [+sliders[moved].min, +sliders[moved].max];
    const x = xScale(lo, hi), y = yScale(0.985 * bestObjective, 1.28 * bestObjective);
    const refitted = lawsAlong(moved).map((t) =>
      [toSlider(moved, getParameter(t, moved, data)), objective(t, data)]);
    const here = toSlider(moved, getParameter(theta, moved, data)), inside = now <= y.to;
    const steep = [here, toSlider(moved, getParameter(best, moved, data))]; // where to look closely
    const alone = steep.flatMap((v) => range(81, -1, 1).map((u) => v + u ** 3 * (hi - lo)))
      .sort((a, b) => a - b).map((v) => [v, objective(withParameter(theta, moved, fromSlider(moved, v), false, data), data)]);
    const px = Math.min(Math.max(x(here), BOX.left), BOX.w - BOX.right);
    const side = here < steep[1] && px > BOX.left + 60 || px > BOX.w - 80 ? `x="${px - 11}" text-anchor="end"` : `x="${px + 11}"`;
    draw($(".objective svg"), {
      x, y, xTicks: ticks(lo, hi, 5), yTicks: ticks(y.from, y.to, 4),
      format: (v) => v.toPrecision(2),
      yLabel: "objective (100 × mean squared log error)",
      xLabel: isCoefficient(moved) ? `${inSvg(moved)} (decades from the best fit)` : inSvg(moved),
      body: `<rect class="limit" x="0" y="${y(limit)}" width="${BOX.w}" height="${BOX.h}"/>`
        + `<path class="alone" d="${path(x, y, alone)}"/>`
        + `<path class="law-curve" d="${path(x, y, refitted)}"/>`,
      over: `<path class="law-curve" d="M${BOX.left} ${BOX.h - 9}h14"/><path class="alone" d="M${BOX.left + 80} ${BOX.h - 9}h14"/>`
        + `<text x="${BOX.left + 18}" y="${BOX.h - 5}">re-fitted</text><text x="${BOX.left + 98}" y="${BOX.h - 5}">held</text>`
        + (inside ? `<circle class="here" cx="${px}" cy="${y(now)}" r="5.5"/>`
        : `<path class="here" d="M${px} ${BOX.top - 1}l6 11h-12z"/>`
          + `<text ${side} y="${BOX.top + 10}">↑ ${number(now)}</text>`),
    });
    $(".objective .title span").innerHTML = inHtml(moved);
  }

  function drawErrors(errors) {
    const percent = errors.map((e) => 100 * Math.expm1(e));
    const worst = Math.max(...percent.map(Math.abs));
    const reach = [1, 3, 6, 12, 24, 60, 120].find((r) => r >= worst) ?? 240;
    const margin = 0.04 * (Math.max(...runs.loss) - Math.min(...runs.loss));
    const x = xScale(Math.min(...runs.loss) - margin, Math.max(...runs.loss) + margin);
    const y = yScale(-reach, reach);
    draw($(".errors svg"), {
      x, y, xTicks: ticks(x.from, x.to, 5), yTicks: ticks(-reach, reach, 6),
      format: (v) => `${v > 0 ? "+" : v < 0 ? "−" : ""}${Math.abs(v)} %`,
      xLabel: "measured loss (nats per token)", yLabel: "measured above (+) or below (−) the law",
      body: `<path class="law-curve" d="M${BOX.left} ${y(0)}H${BOX.w}"/>`
        + dots(x, y, runs.loss.map((v, i) => [v, percent[i]])),
    });
    return worst;
  }

  function drawShape() {
    const N = 10 ** +$("[data-control=size]").value;
    const widthAt = (d) => Math.log(N / 12 / d) / 2 - data.middle[WIDTH];
    const width = (t, d) => term(t, WIDTH, widthAt(d));
    const depth = (t, d) => term(t, DEPTH, Math.log(d) - data.middle[DEPTH]);
    const both = (t, d) => width(t, d) + depth(t, d);
    const shape = optimalShape(theta, N, data), reference = optimalShape(best, N, data);
    const lowest = both(theta, shape.depth), top = 3 * both(best, reference.depth);
    const x = xScale(1, 1000, true), y = yScale(0, top);
    const grid = range(120, 0, Math.log(1000)).map(Math.exp);
    const line = (f, t) => path(x, y, grid.map((d) => [d, f(t, d)]));
    const near = runs.depth.filter((d, i) => Math.abs(Math.log(12 * runs.width[i] ** 2 * d / N)) < 0.7);
    const cheap = grid.filter((d) => both(theta, d) < lowest + 0.01);
    const px = Math.min(Math.max(x(shape.depth), BOX.left), BOX.w - BOX.right);
    const py = Math.max(y(lowest), BOX.top), base = BOX.h - BOX.bottom;
    draw($(".shape svg"), {
      x, y, xTicks: [1, 3, 10, 30, 100, 300, 1000], yTicks: ticks(0, top, 4),
      xLabel: "depth ℓ (layers), width from N = 12 m²ℓ", yLabel: "loss left to shape (nats per token)",
      body: `<path class="line width" d="${line(width, theta)}"/>`
        + `<path class="line depth" d="${line(depth, theta)}"/>`
        + `<path class="law-curve" d="${line(both, theta)}"/><path class="ghost" d="${line(both, best)}"/>`
        + `<path class="rug" d="${near.map((d) => `M${x(d).toFixed(1)} ${base}v-7`).join("")}"/>`,
      over: `<g data-output="best-depth"><path class="drop" d="M${px} ${py}V${base}"/>`
        + `<circle class="here" cx="${px}" cy="${py}" r="5.5"/>`
        + `<text class="inside" x="${px}" y="${Math.max(py - 15, BOX.top + 10)}" text-anchor="middle">`
        + `ℓ = ${number(shape.depth)}</text></g>`,
    });
    say("size", number(N, 2));
    say("best-shape", `Best at N = ${number(N, 2)}: ${number(shape.depth)} layers of width `
      + `${number(shape.width)}. ` + (cheap.length
      ? `From ${number(cheap[0], 2)} to ${number(cheap.at(-1), 2)} layers cost at most 0.01 nats more.` : ""));
    return shape.depth;
  }

  function update() {
    const errors = residuals(theta, data), now = objective(theta, data);
    NAMES.forEach((name, k) => {
      const value = getParameter(theta, k, data);
      const text = isCoefficient(k) ? number(Math.exp(value)) : value.toFixed(isExponent(k) ? 2 : 3);
      sliders[k].value = toSlider(k, value);
      sliders[k].setAttribute("aria-valuetext", text);
      say(name, text);
    });
    drawTerms(errors);
    drawObjective(now);
    const worst = drawErrors(errors), depth = drawShape();
    const ratio = now / bestObjective, symbol = SYMBOLS[moved].join("_");
    const times = ratio < 1.1 ? `${((ratio - 1) * 100).toFixed(1).replace("-0.0", "0.0")} % above`
      : `${number(ratio, ratio < 10 ? 2 : 3)} times`;
    say("objective", now.toPrecision(4));
    say("typical-error", `${Math.sqrt(100 * now).toFixed(now < 1 ? 2 : 0)} %`);
    say("verdict", theta === best ? "the best fit" : mode() !== "fit" ? `${times} the best fit`
      : `${times} the best fit: these runs ${now <= limit ? "do not reject" : "reject"} this ${inHtml(moved)} at 95 %`);
    const label = (panel, text) => $(`.${panel} svg`).setAttribute("aria-label", text);
    label("terms", `Loss against depth, as a stack of the law's terms. At the middle of the runs: depth `
      + `${number(term(theta, DEPTH, 0))}, width ${number(term(theta, WIDTH, 0))}, data `
      + `${number(term(theta, DATA, 0))}, irreducible ${theta[L0].toFixed(2)} nats.`);
    label("objective", `Objective ${now.toPrecision(4)}, best fit ${bestObjective.toPrecision(4)}, along `
      + `${symbol}: flat where the other parameters are re-fitted, steep where they are held.`);
    label("errors", `Error of the law for each of ${data.n} runs against its loss; the largest is ${number(worst, 2)} %.`);
    label("shape", `Width and depth terms against depth at fixed parameters: least at ${number(depth)} layers.`);
  }

  function set(k, value) {
    moved = k;
    theta = mode() === "fit" ? follow(lawsAlong(k), k, value, data)
      : withParameter(theta, k, value, mode() === "term", data);
    update();
  }

  sliders.forEach((slider, k) => slider.addEventListener("input", () =>
    set(k, fromSlider(k, +slider.value))));
  $("[data-control=size]").addEventListener("input", update);
  $("[data-control=reset]").addEventListener("click", () => { theta = best; update(); });
  root.querySelectorAll("input[type=radio]").forEach((radio) => radio.addEventListener("change", () =>
    theta === best ? update() : set(moved, getParameter(theta, moved, data))));
  root.querySelectorAll("[data-alpha-depth]").forEach((button) => button.addEventListener("click", () => {
    $("input[type=radio][value=fit]").checked = true;
    set(DEPTH + 3, +button.dataset.alphaDepth);
  }));
  // Arrow keys belong to the slider, not to the notebook's or the site's shortcuts.
  $("form").addEventListener("keydown", (event) => event.stopPropagation());
  $("form").addEventListener("submit", (event) => event.preventDefault());
  update();
}

// Outside a browser (the tests run this file in node) only the numbers are wanted.
if (typeof document === "undefined") {
  module.exports = { NAMES, prepare, toTheta, objective, profile, follow, getParameter, optimalShape };
}
