"use strict";
// The page can be read without this script. It adds the values under the pointer, or under the cursor keys, and draws
// any of the steps that are kept whole. Text of the data is only ever set as text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";

  const make = (tag, attributes = {}, text = null) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null) element.textContent = text;
    return element;
  };

  const count = (value) => value.toLocaleString("en");
  const digits = (value) => Number(value.toPrecision(3)).toString();
  const seconds = (value) => (value < 1 ? `${digits(1000 * value)} ms` : `${digits(value)} s`);
  const tokens = (value) => (value >= 2 ** 20 ? `${digits(value / 2 ** 20)}M` : value >= 1024 ? `${digits(value / 1024)}K` : `${value}`);
  const ranks = (first, degree) => (degree === 1 ? `rank ${first}` : `ranks ${first} to ${first + degree - 1}`);

  // ------------------------------------------------------------------------------------ what is under the pointer

  // Returns show(words, x, y) and hide(); x and y are pixels within the host.
  const tipOf = (host) => {
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    const said = document.createElement("div"); // for screen readers, whether or not the other is seen
    said.className = "unseen";
    said.setAttribute("aria-live", "polite");
    host.append(tip, said);
    return {
      show(words, x, y) {
        tip.textContent = words;
        tip.hidden = false;
        const left = Math.min(Math.max(x + 14, 0), Math.max(host.clientWidth - tip.offsetWidth, 0));
        const below = host.getBoundingClientRect().top + y + 16 + tip.offsetHeight;
        const top = below > window.innerHeight ? y - tip.offsetHeight - 10 : y + 16;
        tip.style.transform = `translate(${left}px, ${top}px)`;
        if (document.activeElement === host) said.textContent = words;
      },
      hide() { tip.hidden = true; },
    };
  };

  // -------------------------------------------------------------------------------------------------------- charts

  for (const host of document.querySelectorAll("[data-chart]")) {
    const { at, say } = data.charts[host.dataset.chart];
    const svg = host.querySelector("svg");
    const cursor = host.querySelector(".cursor");
    const tip = tipOf(host);
    let place = -1;
    const rest = (next, y = 20) => {
      place = Math.min(Math.max(next, 0), at.length - 1);
      cursor.setAttribute("x1", at[place]);
      cursor.setAttribute("x2", at[place]);
      host.classList.add("is-read");
      tip.show(say[place], (at[place] / svg.viewBox.baseVal.width) * svg.clientWidth, y);
    };
    const leave = () => {
      host.classList.remove("is-read");
      tip.hide();
    };
    host.tabIndex = 0;
    host.setAttribute("role", "group");
    host.setAttribute("aria-label", `${svg.getAttribute("aria-label")} Left and right arrow keys read the values.`);
    host.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      let nearest = 0; // positions ascend
      while (nearest + 1 < at.length && Math.abs(at[nearest + 1] - x) <= Math.abs(at[nearest] - x)) nearest += 1;
      rest(nearest, event.clientY - box.top);
    });
    host.addEventListener("pointerleave", leave);
    host.addEventListener("blur", leave);
    host.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: at.length - 1 };
      if (event.key === "Escape") leave();
      else if (event.key in moves) {
        event.preventDefault();
        rest(moves[event.key]);
      }
    });
  }

  // ------------------------------------------------------------------------------------------------------ timeline

  const host = document.getElementById("timeline");
  const choice = document.getElementById("step");
  const shown = document.getElementById("shown");
  const part = document.getElementById("ranks");
  const facts = document.getElementById("facts");
  const [before, after] = [document.getElementById("before"), document.getElementById("after")];
  const stopOf = (degree) => data.colours[degree];
  const LEFT = 44, RIGHT = 8, TOP = 22, BOTTOM = 34, MOST_BARS = 20000;
  let bars = []; // what can be read: {group, sample, tokens, batch, number, x, y, width, height, element}
  let here = -1;
  let tip = null;

  // Seconds of a group's samples, before them its fixed part: by the cost model if there is one, else by their tokens.
  const partsOf = (group, asPlanned) => {
    const [, degree, , , , , most, predicted] = group;
    const lengths = group[10];
    const total = asPlanned ? predicted : most;
    const knows = data.weights && predicted !== null && degree in data.weights.b;
    const fixed = knows && predicted > 0 ? (total * Math.min(data.weights.fixed[degree], predicted)) / predicted : 0;
    const work = lengths.map((n) => (knows ? data.weights.a * n * n + data.weights.b[degree] * n : n));
    const sum = work.reduce((a, b) => a + b, 0);
    return { total, fixed, parts: work.map((w) => (sum > 0 ? ((total - fixed) * w) / sum : 0)) };
  };

  const roundTicks = (high, most) => {
    if (!(high > 0)) return [0];
    const rough = high / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 2.5, 5, 10].find((factor) => power * factor >= rough * 0.999999);
    return Array.from({ length: Math.floor(high / step + 1e-9) + 1 }, (_, k) => k * step);
  };

  const draw = () => {
    const step = data.steps[Number(choice.value)];
    const asPlanned = shown.value === "planned";
    const [from, to] = part.value === "all" ? [0, step.ranks] : part.value.split("-").map(Number);
    const width = Math.max(host.clientWidth, 280);
    const rows = Math.min(Math.max(26 * (to - from), 60), 520);
    const height = TOP + rows + BOTTOM;
    const batches = step.batches.map((groups) =>
      groups.map((group) => ({ group, ...partsOf(group, asPlanned) })));
    const longest = batches.map((groups) => Math.max(...groups.map((one) => one.total)));
    const total = longest.reduce((a, b) => a + b, 0);
    const perSecond = (width - LEFT - RIGHT) / (total || 1);
    const perRank = rows / (to - from);
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
    const pattern = make("pattern", { id: "waiting-now", width: 6, height: 6, patternUnits: "userSpaceOnUse" });
    pattern.append(make("path", { d: "M0 6L6 0", class: "hatch" }));
    svg.append(make("defs"));
    svg.firstChild.append(pattern);
    bars = [];
    let start = 0;
    const numBars = step.batches.flat().reduce((sum, group) => sum + group[9].length, 0);
    batches.forEach((groups, number) => {
      const x0 = LEFT + start * perSecond;
      const span = longest[number] * perSecond;
      svg.append(make("rect", { x: x0, y: TOP, width: span, height: rows, class: "waiting" }));
      for (const one of groups) {
        const [first, degree] = one.group;
        const top = TOP + (Math.max(first, from) - from) * perRank;
        const end = TOP + (Math.min(first + degree, to) - from) * perRank;
        if (end <= top || !one.group[10].length) continue;
        drawGroup(svg, one, { x0, top, height: end - top, perSecond, number, whole: numBars > MOST_BARS });
      }
      if (span > 84) svg.append(make("text", { x: x0 + 2, y: TOP - 8, class: "tick" }, `micro-batch ${number + 1}`));
      start += longest[number];
      svg.append(make("line", { x1: LEFT + start * perSecond, x2: LEFT + start * perSecond, y1: TOP - 4, y2: TOP + rows + 4, class: "ends" }));
    });
    for (const value of roundTicks(total, Math.max(2, Math.floor(width / 110)))) {
      const x = LEFT + value * perSecond;
      svg.append(make("text", { x, y: TOP + rows + 16, class: "tick middle" }, `${Number(value.toPrecision(6))}`));
    }
    const every = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024].find((n) => n * perRank >= 13) || to - from;
    for (let rank = from; rank < to; rank += every) {
      svg.append(make("text", { x: LEFT - 6, y: TOP + (rank - from + 0.5) * perRank + 4, class: "tick end" }, rank));
    }
    svg.append(make("text", { x: 0, y: TOP - 8, class: "axis" }, "rank"));
    svg.append(make("text", { x: width - RIGHT, y: height - 3, class: "axis end" }, `seconds, ${asPlanned ? "as planned" : "as measured"}`));
    host.replaceChildren(svg);
    host.classList.add("drawn");
    tip = tipOf(host);
    here = -1;
    sayFacts(step, asPlanned, total, batches, longest);
  };

  const drawGroup = (svg, one, place) => {
    const [first, degree] = one.group;
    const stop = stopOf(degree);
    let x = place.x0;
    const fixed = one.fixed * place.perSecond;
    if (fixed > 0.5) svg.append(make("rect", { x, y: place.top, width: fixed, height: place.height, class: "fixed" }));
    x += fixed;
    const all = (one.total - one.fixed) * place.perSecond;
    const low = place.height < 4 ? " thin" : "";
    svg.append(make("rect", { x, y: place.top, width: all, height: place.height, class: `${stop}${low}` }));
    const samples = place.whole ? [-1] : one.group[9].map((_, index) => index);
    for (const index of samples) {
      const width = index < 0 ? all : one.parts[index] * place.perSecond;
      const thin = place.height < 4 || width < 3 ? " thin" : ""; // its edge would hide it
      const element = make("rect", { x, y: place.top, width, height: place.height, class: `sample ${stop}${thin}` });
      svg.append(element);
      bars.push({ group: one.group, index, batch: place.number, x, y: place.top, width, height: place.height, element, seconds: width / place.perSecond });
      const label = index < 0 ? "" : tokens(one.group[10][index]);
      if (place.height > 14 && width > 9 * label.length + 14) {
        svg.append(make("text", { x: x + width / 2, y: place.top + place.height / 2 + 4, class: `inside on-${stop}` }, label));
      }
      x += width;
    }
    if (place.height >= 13 && all >= 16) {
      svg.append(make("text", { x: place.x0 + fixed + 5, y: place.top + 12, class: `chip on-${stop}`, "pointer-events": "none" }, degree));
    }
  };

  const sayFacts = (step, asPlanned, total, batches, longest) => {
    const area = longest.reduce((sum, value) => sum + value * step.ranks, 0);
    const busy = batches.flat().reduce((sum, one) => sum + one.total * one.group[1], 0);
    const numbers = [
      ["degrees", step.degrees],
      [asPlanned ? "planned" : "measured", seconds(asPlanned ? step.planned : step.seconds)],
      [asPlanned ? "measured" : "planned", seconds(asPlanned ? step.seconds : step.planned)],
    ];
    if (asPlanned && step.gap !== null) numbers.push(["within", `${digits(100 * step.gap)} % of the bound`]);
    if (area > 0 && !(step.lockstep && !asPlanned)) numbers.push(["waiting", `${Math.round(100 * (1 - busy / area))} %`]);
    if (step.wait > 0.005) numbers.push(["waited before it", seconds(step.wait)]);
    facts.replaceChildren();
    numbers.forEach(([name, value], index) => {
      const bold = document.createElement("b");
      bold.textContent = value;
      facts.append(`${index ? " · " : ""}${name} `, bold);
    });
  };

  const wordsOf = (bar) => {
    const [first, degree, method, inner, activations, least, most, predicted, exchange, samples, lengths] = bar.group;
    const lines = [];
    if (bar.index >= 0) lines.push(`sample ${count(samples[bar.index])}: ${count(lengths[bar.index])} tokens, ${seconds(bar.seconds)}`);
    lines.push(`degree ${degree}, ${ranks(first, degree)}, micro-batch ${bar.batch + 1}`);
    if (degree > 1) {
      lines.push(`${method}: ${data.methods[method]}${inner ? `, blocks of ${inner}` : ""}`);
      if (exchange !== null) lines.push(`exchange ${seconds(exchange)}, predicted`);
    } else lines.push("nothing is exchanged");
    if (activations) lines.push(activations === "offload" ? "recomputes layers, offloads to the host" : "recomputes layers");
    const measured = least < most && degree > 1 ? `${seconds(least)} to ${seconds(most)}` : seconds(most);
    const planned = predicted === null ? "" : `, predicted ${seconds(predicted)}`;
    lines.push(`its group: ${count(samples.length)} samples, ${count(lengths.reduce((a, b) => a + b, 0))} tokens; measured ${measured}${planned}`);
    return lines.join("\n");
  };

  const rest = (index, x, y) => {
    if (here >= 0) bars[here].element.classList.remove("here");
    here = index;
    if (index < 0) return tip.hide();
    const bar = bars[index];
    bar.element.classList.add("here");
    return tip.show(wordsOf(bar), x ?? bar.x + Math.min(bar.width / 2, 40), y ?? bar.y + bar.height / 2);
  };

  const found = (event) => {
    const box = host.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    return [bars.findIndex((b) => x >= b.x && x < b.x + b.width && y >= b.y && y < b.y + b.height), x, y];
  };

  // The nearest bar to the right, left, above or below: by where its middle is, along the way first.
  const neighbour = (key) => {
    if (here < 0) return bars.length ? 0 : -1;
    const middle = (b) => [b.x + b.width / 2, b.y + b.height / 2];
    const [x, y] = middle(bars[here]);
    const [along, sign] = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 1], ArrowUp: [1, -1] }[key];
    let [best, least] = [here, Infinity];
    bars.forEach((bar, index) => {
      const at = middle(bar);
      const ahead = sign * (at[along] - (along ? y : x));
      const aside = Math.abs(at[1 - along] - (along ? x : y));
      if (ahead > 0.01 && ahead + 4 * aside < least) [best, least] = [index, ahead + 4 * aside];
    });
    return best;
  };

  if (host) {
    const controls = document.getElementById("controls");
    controls.hidden = document.getElementById("hint").hidden = false;
    host.tabIndex = 0;
    host.setAttribute("role", "group");
    host.setAttribute("aria-label", "Timeline of a step. Arrow keys go from sample to sample.");
    const turn = () => {
      const step = data.steps[Number(choice.value)];
      before.disabled = choice.selectedIndex === 0;
      after.disabled = choice.selectedIndex === choice.options.length - 1;
      shown.disabled = step.batches.flat().some((group) => group[7] === null);
      if (shown.disabled) shown.value = "measured";
      const size = 64;
      const parts = ["all"];
      if (step.ranks > size) for (let first = 0; first < step.ranks; first += size) parts.push(`${first}-${Math.min(first + size, step.ranks)}`);
      const chosen = parts.includes(part.value) ? part.value : "all";
      part.replaceChildren(...parts.map((value) => new Option(value === "all" ? `all ${step.ranks}` : `${value.split("-")[0]} to ${value.split("-")[1] - 1}`, value)));
      part.value = chosen;
      part.disabled = parts.length === 1;
      draw();
    };
    const go = (by) => {
      choice.selectedIndex = Math.min(Math.max(choice.selectedIndex + by, 0), choice.options.length - 1);
      turn();
    };
    choice.addEventListener("change", turn);
    shown.addEventListener("change", draw);
    part.addEventListener("change", draw);
    before.addEventListener("click", () => go(-1));
    after.addEventListener("click", () => go(1));
    host.addEventListener("pointermove", (event) => rest(...found(event)));
    host.addEventListener("pointerdown", (event) => rest(...found(event)));
    host.addEventListener("pointerleave", () => rest(-1));
    host.addEventListener("blur", () => rest(-1));
    host.addEventListener("keydown", (event) => {
      if (event.key === "Escape") rest(-1);
      else if (event.key === "Home" || event.key === "End") rest(event.key === "Home" ? 0 : bars.length - 1);
      else if (event.key.startsWith("Arrow")) rest(neighbour(event.key));
      else if (event.key === "PageDown" || event.key === "PageUp") go(event.key === "PageDown" ? 1 : -1);
      else return;
      event.preventDefault();
    });
    let drawnFor = host.clientWidth;
    window.addEventListener("resize", () => {
      if (host.clientWidth !== drawnFor) {
        drawnFor = host.clientWidth;
        draw();
      }
    });
    turn();
  }
  document.documentElement.dataset.ready = "yes"; // whoever looks at the page by a program waits for it
})();
