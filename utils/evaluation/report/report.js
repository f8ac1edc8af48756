"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");
  const card = document.getElementById("card");
  const BASELINE = "baseline_generation";
  const mode = data.run === BASELINE ? "baseline" : data.run.startsWith("verify_") ? "verify" : "chunk";
  const MILLION = 1e6;
  const ACCEPTED = 1, VETOED = 2, REPEATS = 3;

  // ---- Elements. Text goes in as text nodes only.

  function put(parent, children) {
    for (const child of children.flat(3)) {
      if (child !== null && child !== undefined && child !== "") parent.append(child);
    }
    return parent;
  }

  /** el("p.soft.small", …children) */
  function el(kind, ...children) {
    const [tag, ...classes] = kind.split(".");
    const node = document.createElement(tag);
    if (classes.length) node.className = classes.join(" ");
    return put(node, children);
  }

  function svg(tag, attributes, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return put(node, children);
  }

  /** Control characters but line ends and tabs as symbols, and marks that turn the direction of writing as a box. */
  function visible(text) {
    return text
      .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
      .replace(/\u007f/g, "\u2421")
      .replace(/[\u0080-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
  }

  /** A short text on one line, the spaces at its ends to be seen. */
  const inline = (text) => visible(text).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));

  const number = (value, decimals = 0) =>
    value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals }).replace("-", "−");
  const percent = (share, decimals = 1) => number(100 * share, decimals);
  const count = (n, one, many = one + "s") => `${number(n)} ${n === 1 ? one : many}`;
  const ms = (microseconds) => `${number(microseconds / 1000, microseconds < 99950 ? 1 : 0)} ms`;
  const similarity = (millionths) => (millionths / MILLION).toFixed(3);
  const sum = (values) => values.reduce((a, b) => a + b, 0);

  // ---- The figures

  function tile(name, value, unit, aside) {
    const shown = el("div.value", value, unit ? el("small", unit) : null);
    return el("div.tile", el("div.name", name), shown, el("div.aside", aside || ""));
  }

  function tiles() {
    const f = data.figures, base = data.baseline, found = [];
    if (f.new_tokens === undefined) return null;
    const passes = `${number(f.forward_passes)} for ${count(f.new_tokens, "token")}`;
    if (mode === "chunk") {
      found.push(tile("Forward passes saved", percent(f.fps), "%", passes));
    } else if (mode === "verify") {
      found.push(tile("Tokens per forward pass", number(f.tokens_per_forward, 2), "", passes));
    }
    const perToken = f.seconds_per_token * 1e6;
    if (base && f.tts !== undefined && f.tts !== null) {
      const aside = `${ms(perToken)}, baseline ${ms(base.seconds_per_token * 1e6)}`;
      found.push(tile("Time per token saved", percent(f.tts), "%", aside + (f.tts_same_run ? "" : ", timed apart")));
    } else {
      found.push(tile("Time per token", number(perToken / 1000, 2), "ms", mode === "baseline" ? "" : "no baseline to compare with"));
    }
    if (mode === "chunk") {
      const length = f.mean_chunk_length ? `${count(f.chunks_accepted, "chunk")} of ${number(f.mean_chunk_length, 2)} tokens` : "no chunk accepted";
      found.push(tile("Tokens from chunks", percent(f.share_from_chunks || 0), "%", length));
    } else if (mode === "verify" && f.drafts) {
      found.push(tile("Accepted per draft", number(f.accepted_per_draft, 2), "", `of ${number(f.draft_length, 1)} drafted tokens`));
    }
    if (mode !== "baseline" && f.seconds) {
      const share = f.retrieval_seconds / f.seconds;
      found.push(tile("Time in retrieval", percent(share), "%", `LM ${percent(f.lm_seconds / f.seconds)}%, rest ${percent(f.rest_seconds / f.seconds)}%`));
    }
    if (f.perplexity) {
      const aside = base && base.perplexity ? `baseline ${number(base.perplexity, 2)}` : "";
      found.push(tile("Perplexity under the LM", number(f.perplexity, 2), "", aside));
    }
    return el("div.tiles", found);
  }

  function lead() {
    const f = data.figures;
    const amount = `${count(f.prompts ?? data.texts.length, "text")}, ${count(f.new_tokens ?? 0, "new token")}. `;
    if (mode === "baseline") return amount + "The model alone, without a datastore.";
    if (mode === "verify") return amount + "The model’s own text: drafts from the datastore and from the text so far, confirmed by the model, several tokens in one pass.";
    const rule = data.policy === "threshold" ? `accepted where the cosine similarity is ${data.theta} or more` : "accepted with a probability that grows with similarity";
    return `${amount}Chunks of ${visible(data.corpus)}, ${data.map && data.fitted ? "accepted by a fitted map" : rule}.`;
  }

  // ---- Charts, drawn for the width there is

  const drawings = [];

  function chart(title, about, draw, ...keys) {
    const holder = el("div");
    drawings.push(() => {
      const width = Math.max(holder.clientWidth, 200);
      if (holder.drawnWidth === width) return;
      holder.drawnWidth = width;
      holder.replaceChildren(draw(width));
    });
    const key = keys.length ? el("div.key", keys.map(([kind, text]) => el(kind ? "span." + kind : "span", text))) : null;
    return el("section.chart", el("h3", title), el("p.soft.small", about), holder, key);
  }

  /** Bars over a row of labels. bars: [[value, class], …] for each place; labels: [place, text]. */
  function columns(width, bars, labels, name, extra = () => []) {
    const height = 132, left = 34, bottom = 20, top = 8;
    const highest = Math.max(1e-9, ...bars.map((stack) => sum(stack.map(([value]) => value))));
    const step = Math.min((width - left) / bars.length, 44), plot = height - bottom - top;
    const y = (value) => top + plot * (1 - value / highest);
    const gap = Math.min(2, step * 0.2);
    const drawn = bars.flatMap((stack, i) => {
      let below = 0;
      return stack.map(([value, kind, title]) => {
        const from = below;
        below += value;
        if (!value) return null;
        const rect = svg("rect", { x: left + i * step + gap / 2, width: Math.max(step - gap, 0.5), y: y(below), height: Math.max(y(from) - y(below), 0.5), class: kind });
        if (title) rect.append(svg("title", {}, title));
        return rect;
      });
    });
    const text = labels.map(([place, label, anchor = "middle"]) => svg("text", { x: left + place * step, y: height - 5, "text-anchor": anchor }, label));
    const axis = svg("line", { x1: left, x2: width, y1: height - bottom + 0.5, y2: height - bottom + 0.5, class: "axis" });
    const scale = svg("text", { x: left - 6, y: top + 9, "text-anchor": "end" }, highest <= 1 ? percent(highest, 0) + "%" : number(highest));
    return svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": name }, drawn, axis, text, scale, extra({ left, step, top, base: height - bottom }));
  }

  function similarityChart() {
    const h = data.histogram;
    if (!h) return null;
    const nAccepted = sum(h.accepted), nRejected = sum(h.rejected), decimals = h.width < 0.01 ? 3 : 2;
    const at = (i) => (h.first + i * h.width).toFixed(decimals);
    const draw = (width) => {
      const bars = h.accepted.map((n, i) => [
        [n, "fill-accepted", `${at(i)} to ${at(i + 1)}: ${number(n)} accepted, ${number(h.rejected[i])} not`],
        [h.rejected[i], "fill-rejected", `${at(i)} to ${at(i + 1)}: ${number(h.rejected[i])} not accepted, ${number(n)} accepted`],
      ]);
      const span = bars.length * h.width, apart = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find((each) => span / each <= width / 48) || 1;
      const labels = [];
      for (let tick = Math.ceil(h.first / apart - 1e-6); tick * apart <= h.first + span + 1e-6; tick++) {
        labels.push([(tick * apart - h.first) / h.width, (tick * apart).toFixed(apart < 0.1 ? 2 : 1)]);
      }
      return columns(width, bars, labels, `Similarity of ${nAccepted} accepted and ${nRejected} other proposals`, ({ left, step, top, base }) => {
        const line = svg("line", { y1: top - 4, y2: base, class: "theta-line" });
        thetaLine = (theta) => {
          line.setAttribute("visibility", data.fitted && moved === null ? "hidden" : "visible");
          const x = left + (Math.min(Math.max(theta, h.first), h.first + h.width * bars.length) - h.first) / h.width * step;
          line.setAttribute("x1", x);
          line.setAttribute("x2", x);
        };
        thetaLine(theta());
        return [line];
      });
    };
    const line = data.fitted ? "The acceptance map was fitted: θ had no part in it." : data.policy === "threshold" ? "The line is θ." : "The line is θ, where one in two is accepted.";
    const about = `Best similarity at each step that had a proposal: ${number(nAccepted + nRejected)}. ${line}`;
    return chart("Similarity of proposals", about, draw, ["accepted", "accepted"], ["", "not accepted"]);
  }

  function lengthsChart() {
    if (!data.lengths.length) return null;
    return counts("Length of chunks", "Accepted chunks by tokens.", data.lengths, "chunk");
  }

  /** values: [[number, how many], …] */
  function counts(title, about, values, what) {
    const most = Math.min(Math.max(...values.map(([n]) => n)), 24), of = new Map();
    for (const [n, found] of values) of.set(Math.min(n, most), (of.get(Math.min(n, most)) || 0) + found);
    const all = Array.from({ length: most }, (_, i) => of.get(i + 1) || 0);
    const isCut = values.some(([n]) => n > most);
    const name = (n) => (isCut && n === most ? `${n}+` : String(n));
    const draw = (width) => {
      const every = Math.ceil(most / Math.max(Math.floor(width / 26), 1));
      const labels = all.map((_, i) => [i + 0.5, name(i + 1)]).filter(([i]) => (i - 0.5) % every === 0);
      const bars = all.map((n, i) => [[n, "fill-accepted", `${name(i + 1)}: ${count(n, what, what === "pass" ? "passes" : what + "s")}`]]);
      return columns(width, bars, labels, title);
    };
    return chart(title, about, draw);
  }

  function positionsChart() {
    const shares = data.figures.acceptance_by_position || [];
    if (!shares.length) return null;
    const known = shares.map((share) => share || 0);
    const draw = (width) => {
      const bars = known.map((share, i) => [[share, "fill-accepted", `${i + 1} ahead: ${percent(share)}% accepted`]]);
      return columns(width, bars, known.map((_, i) => [i + 0.5, String(i + 1)]), "Share of drafts accepted by distance");
    };
    return chart("Drafted tokens accepted", "By how many tokens ahead they were drafted.", draw);
  }

  function passesChart() {
    const found = new Map();
    for (const text of data.texts) {
      for (const n of text.steps ? text.steps.tokens.slice(1) : []) found.set(n, (found.get(n) || 0) + 1);
    }
    if (!found.size) return null;
    return counts("Tokens in one pass", "Forward passes by the tokens they brought.", [...found].sort((a, b) => a[0] - b[0]), "pass");
  }

  function timeChart() {
    const runs = [[mode === "baseline" ? "model alone" : mode === "verify" ? "verified" : "with chunks", data.figures], ["baseline", data.baseline]]
      .filter(([, run]) => run && run.new_tokens);
    if (!runs.length) return null;
    const parts = ["lm", "retrieval", "rest"];
    const draw = (width) => {
      const left = 84, right = 58, rowHeight = 34;
      const longest = Math.max(...runs.map(([, run]) => run.seconds_per_token)) || 1;
      const rows = runs.flatMap(([name, run], i) => {
        let x = left;
        const y = i * rowHeight + 6;
        const bars = parts.map((part) => {
          const each = run[part + "_seconds"] / run.new_tokens, w = each / longest * (width - left - right);
          const rect = svg("rect", { x, y, width: Math.max(w, 0), height: 18, class: "fill-" + part }, svg("title", {}, `${part === "lm" ? "LM" : part}: ${number(each * 1000, 3)} ms`));
          x += w;
          return rect;
        });
        return [svg("text", { x: left - 8, y: y + 13, "text-anchor": "end", class: "strong" }, name), ...bars, svg("text", { x: x + 6, y: y + 13 }, `${number(run.seconds_per_token * 1000, 2)} ms`)];
      });
      return svg("svg", { viewBox: `0 0 ${width} ${runs.length * rowHeight + 8}`, height: runs.length * rowHeight + 8, role: "img", "aria-label": "Time per new token" }, rows);
    };
    return chart("Time per new token", "The prompts’ passes included.", draw, ["lm", "LM"], ["retrieval", "retrieval"], ["rest", "rest"]);
  }

  // ---- Tables

  function fold(title, ...children) {
    const node = el("details.fold", el("summary", title), children);
    return node;
  }

  function figuresTable() {
    if (data.table.length < 2) return null;
    const [head, ...rows] = data.table;
    const broken = (cell) => cell.split(/(?<=_)|(?= \[)/).map((part) => [el("span", part), el("wbr")]);
    const body = rows.map(([label, ...cells]) => {
      const kind = label.startsWith("  ") ? "tr.part" : cells.some((cell) => cell) ? "tr" : "tr.group";
      return el(kind, el("td", label.trim()), cells.map((cell) => el("td", broken(cell))));
    });
    const apart = data.timesOfTwoCommands;
    return fold("All figures", el("div.scroll", el("table", el("thead", el("tr", head.map((cell) => el("th", broken(cell))))), el("tbody", body))),
      apart.length ? el("p.soft.small", `Time saved of ${apart.join(", ")}: the baseline was timed by another command; time both by one to compare.`) : null);
  }

  function facts() {
    const rows = data.facts.map(([label, value]) => el("tr", el("td", visible(label)), el("td", visible(value))));
    return fold("How it was made", el("div.scroll", el("table.facts", el("tbody", rows))));
  }

  // ---- θ: what would be accepted, the texts being as they are

  // Null until the slider is moved: then the page shows what was accepted. In millionths, as similarities are.
  let moved = null;
  let thetaLine = () => {};
  const theta = () => (moved === null ? data.theta : moved / MILLION);
  const least = Math.round(data.minFirstTokenProb * MILLION);
  const isLikely = (proposal) => proposal === undefined || (proposal[5] >= least && proposal[3] !== REPEATS);
  const shows = (mark) => (moved === null ? mark.accepted : mark.similarity >= moved && isLikely(mark.proposal));
  // Similar enough, but the LM gives the first token too little, or the text would repeat itself.
  const isVetoed = (mark) => (moved === null ? mark.vetoed : mark.similarity >= moved && !isLikely(mark.proposal));
  const allProposals = data.texts.flatMap((text) => text.proposals);
  const likelySimilarities = Float64Array.from(allProposals.filter(isLikely).map((proposal) => proposal[1])).sort();
  const nAccepted = allProposals.filter((proposal) => proposal[3] === ACCEPTED).length;

  function atOrAbove(millionths) {
    let low = 0, high = likelySimilarities.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (likelySimilarities[middle] < millionths) low = middle + 1;
      else high = middle;
    }
    return likelySimilarities.length - low;
  }

  function bar() {
    const parts = [];
    const n = allProposals.length;
    if (n) {
      const lowest = Math.max(Math.floor(allProposals.reduce((low, proposal) => Math.min(low, proposal[1]), MILLION) / 1e4) / 100, -1);
      const slider = document.createElement("input");
      Object.assign(slider, { type: "range", id: "theta", min: String(lowest), max: "1", step: "0.005", value: String(data.theta) });
      const shown = el("output"), said = el("div.said"), reset = el("button", "as it was");
      said.setAttribute("aria-live", "polite");
      const tell = () => {
        const now = moved === null ? nAccepted : atOrAbove(moved);
        shown.textContent = data.fitted && moved === null ? "as fitted" : theta().toFixed(3).replace(/0$/, "");
        if (moved === null) said.replaceChildren(el("b", number(now)), ` of ${number(n)} proposals were accepted`);
        else said.replaceChildren(el("b", number(now)), ` of ${number(n)} would be accepted, ${number(nAccepted)} were`);
        reset.disabled = moved === null;
        slider.value = String(theta());
        thetaLine(theta());
        recolourVisible();
      };
      slider.addEventListener("input", () => {
        // To the millionth, since 0.1 + 0.2 is not 0.3.
        moved = Math.round(Number(slider.value) * MILLION);
        if (data.policy === "threshold" && !data.fitted && moved === Math.round(data.theta * MILLION)) moved = null;
        tell();
      });
      reset.addEventListener("click", () => { moved = null; tell(); });
      const label = el("label", "θ", slider, shown);
      label.htmlFor = "theta";
      parts.push(label, reset, said, ramp());
      starts.push(tell);
    } else if (marksOf.some((marks) => marks.length)) {
      parts.push(el("div.said", mode === "verify" ? "Coloured: drafted tokens that the model confirmed, those of one pass together." : "Coloured: chunks."));
    }
    return parts.length ? el("div.bar", parts) : null;
  }

  function ramp() {
    return colours.high > colours.low ? el("div.ramp", similarity(colours.low).slice(0, -1), el("i"), similarity(colours.high).slice(0, -1)) : null;
  }

  function jump() {
    if (data.texts.length < 4) return null;
    const select = el("select", el("option", "go to text …"), data.texts.map((text, i) => {
      const option = el("option", `${text.index}: ${inline(text.prompt.trim()).slice(0, 40)}`);
      option.value = String(i);
      return option;
    }));
    select.setAttribute("aria-label", "Go to a text");
    select.addEventListener("change", () => {
      if (select.value in articles) goTo(articles[select.value], 4);
      select.selectedIndex = 0;
    });
    return select;
  }

  /** What is laid out on the way there may move it. */
  function goTo(node, tries) {
    const before = node.getBoundingClientRect().top;
    node.scrollIntoView();
    const isThere = Math.abs(node.getBoundingClientRect().top - before) < 1;
    if (tries && !isThere) requestAnimationFrame(() => requestAnimationFrame(() => goTo(node, tries - 1)));
  }

  // ---- Texts

  /** What can be pointed at in a text, in order: chunks, other proposals, and tokens confirmed by one pass. */
  function findMarks(text) {
    const proposals = new Map(text.proposals.map((proposal) => [proposal[0], proposal]));
    const marks = text.chunks.map(([at, n, found]) => ({ at, n, similarity: found, accepted: true, proposal: proposals.get(at) }));
    const inChunks = new Set(text.chunks.map(([at]) => at));
    for (const [at, found, , accepted] of text.proposals) {
      if (!inChunks.has(at)) marks.push({ at, n: 1, similarity: found, accepted: accepted === ACCEPTED, vetoed: accepted === VETOED || accepted === REPEATS, proposal: proposals.get(at) });
    }
    if (mode === "verify" && text.steps) {
      let at = 0;
      text.steps.tokens.forEach((n, step) => {
        if (n > 1) marks.push({ at: at + 1, n: n - 1, step, accepted: true });
        at += n;
      });
    }
    return marks.sort((a, b) => a.at - b.at);
  }

  const marksOf = data.texts.map(findMarks);
  const colours = (() => {
    const found = marksOf.flat().filter((mark) => mark.accepted && mark.similarity !== undefined).map((mark) => mark.similarity).sort((a, b) => a - b);
    const at = (share) => found[Math.min(Math.floor(share * found.length), found.length - 1)] || 0;
    return { low: at(0.02), high: at(0.98) };
  })();

  function strength(mark) {
    if (mark.similarity === undefined || colours.high <= colours.low) return 0.34;
    return 0.14 + 0.48 * Math.min(Math.max((mark.similarity - colours.low) / (colours.high - colours.low), 0), 1);
  }

  function markedText(text, marks) {
    const node = el("p.text");
    let at = 0;
    const plain = (end) => {
      if (end > at) node.append(visible(text.tokens.slice(at, end).join("")));
      at = end;
    };
    for (const mark of marks) {
      if (mark.at < at) continue;
      plain(mark.at);
      const isChunk = mark.accepted;
      const span = el(isChunk ? "span.seen.chunk" : "span.seen.other", visible(text.tokens.slice(at, at + mark.n).join("")));
      at += mark.n;
      if (isChunk) span.style.setProperty("--a", strength(mark).toFixed(3));
      span.mark = mark;
      span.text = text;
      mark.span = span;
      node.append(span);
    }
    plain(text.tokens.length);
    if (!text.tokens.length) node.append(el("span.nothing", "no new token"));
    return node;
  }

  /** Show which marks count at this θ, and let the first of them be reached with the tab key. */
  function recolour(article) {
    let first = true;
    for (const mark of article.marks) {
      const span = mark.span;
      if (!span) continue;
      const on = shows(mark) || isVetoed(mark);
      if (mark.accepted) span.classList.toggle("off", !on);
      else span.classList.toggle("on", on);
      if (!mark.accepted && !on) {
        span.removeAttribute("tabindex");
        span.removeAttribute("role");
        continue;
      }
      span.setAttribute("role", "button");
      span.tabIndex = first ? 0 : -1;
      first = false;
    }
    article.shownAt = moved;
  }

  function recolourVisible() {
    for (const article of inView) if (article.shownAt !== moved) recolour(article);
  }

  function summaryOf(text) {
    const n = text.tokens.length, parts = [count(n, "token"), count(text.passes, "pass", "passes")];
    if (mode === "chunk" && n) parts.push(`${percent(sum(text.chunks.map(([, length]) => length)) / n, 0)}% from ${count(text.chunks.length, "chunk")}`);
    const base = text.baseline;
    if (base && base.tokens && n && base.seconds) {
      const saved = 1 - text.seconds / n / (base.seconds / base.tokens);
      if (Math.abs(saved) >= 0.005) parts.push(`${percent(Math.abs(saved), 0)}% ${saved > 0 ? "less" : "more"} time per token`);
    }
    return parts.join(" · ");
  }

  function article(text, i) {
    const prompt = el("p.text.prompt", visible(text.prompt)), box = el("div.prompt-box", prompt);
    if (text.prompt.length > 700 || text.prompt.split("\n").length > 7) {
      prompt.classList.add("long");
      const more = el("button.more", "whole prompt");
      more.addEventListener("click", () => {
        const isLong = prompt.classList.toggle("long");
        more.textContent = isLong ? "whole prompt" : "less";
      });
      box.append(more);
    }
    const own = el("p.text", visible(text.tokens.join("")));
    const body = el(text.baseline ? "div.columns.two" : "div.columns", el("div", text.baseline ? el("h4", mode === "verify" ? "Verified" : "With chunks") : null, own));
    if (text.baseline) body.append(el("div", el("h4", "Baseline"), el("p.text", visible(text.baseline.text))));
    const node = el("article", el("header", el("h3", `Text ${text.index}`), el("span.soft", summaryOf(text))), text.prompt ? box : null, body);
    node.marks = marksOf[i];
    node.style.containIntrinsicBlockSize = `auto ${estimatedHeight(text)}px`;
    node.upgrade = () => {
      if (node.isUpgraded) return;
      node.isUpgraded = true;
      own.replaceWith(markedText(text, node.marks));
      const line = timeline(text);
      if (line) node.append(line);
      recolour(node);
    };
    return node;
  }

  /** Of an article in pixels, as long as it is out of sight. */
  function estimatedHeight(text) {
    const width = Math.min(document.documentElement.clientWidth, 1248) - 48, isWide = width > 800;
    const columns = Math.max((text.baseline && isWide ? width / 2 : width) / 8.1, 20);
    const lines = (shown) => sum(shown.split("\n").map((line) => Math.max(Math.ceil(line.length / columns), 1)));
    const own = lines(text.tokens.join("")), base = text.baseline ? lines(text.baseline.text) : 0;
    return Math.round(200 + 23.3 * (Math.min(lines(text.prompt), 7) + (isWide ? Math.max(own, base) : own + base + 1)));
  }

  // ---- The time of each step

  function timeline(text) {
    const steps = text.steps;
    if (!steps || steps.tokens.length < 2) return null;
    const n = steps.tokens.length - 1, parts = ["lm", "retrieval", "rest"];
    const total = (i) => sum(parts.map((part) => steps[part][i]));
    const totals = Array.from({ length: n }, (_, i) => total(i + 1));
    const ordered = [...totals].sort((a, b) => a - b);
    const highest = Math.max(ordered[Math.floor(0.97 * (n - 1))] * 1.15, 1);
    const starts_ = [];
    let at = 0;
    for (const tokens of steps.tokens) { starts_.push(at); at += tokens; }
    const chunkStarts = new Set(text.chunks.map(([start]) => start));
    const holder = el("div"), said = el("div.small");
    const all = sum(parts.map((part) => sum(steps[part])));
    const usual = `Time of each pass, ${ms(ordered[n >> 1])} at the median; the prompt’s took ${ms(total(0))}. ` +
      parts.map((part) => `${part === "lm" ? "LM" : part} ${percent(sum(steps[part]) / all, 0)}%`).join(", ") + ".";
    said.textContent = usual;
    const height = 46, tick = 5;
    let pointed = null;
    const draw = () => {
      const width = Math.max(holder.clientWidth, 200), step = width / n;
      const y = (value) => (height - tick - 2) * (1 - Math.min(value / highest, 1));
      const below = new Array(n).fill(0);
      const paths = parts.map((part) => {
        let d = "";
        for (let i = 0; i < n; i++) {
          const from = below[i];
          below[i] += steps[part][i + 1];
          const a = y(from), b = y(below[i]);
          if (a - b > 0.05) d += `M${(i * step).toFixed(2)} ${a.toFixed(1)}V${b.toFixed(1)}h${(step > 3 ? step - 0.6 : step).toFixed(2)}V${a.toFixed(1)}z`;
        }
        return svg("path", { d, class: "fill-" + part });
      });
      let d = "";
      for (let i = 0; i < n; i++) {
        const isChunk = mode === "verify" ? steps.tokens[i + 1] > 1 : chunkStarts.has(starts_[i + 1]);
        if (isChunk) d += `M${(i * step).toFixed(2)} ${height - tick}h${(step > 3 ? step - 0.6 : step).toFixed(2)}v${tick - 1}h${(-(step > 3 ? step - 0.6 : step)).toFixed(2)}z`;
      }
      const cursor = svg("rect", { y: 0, width: Math.max(step, 1.5), height, fill: "currentColor", opacity: 0 });
      const image = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": usual }, paths, svg("path", { d, class: "fill-accepted" }), cursor);
      const point = (event) => {
        const box = image.getBoundingClientRect();
        const i = Math.min(Math.max(Math.floor((event.clientX - box.left) / box.width * n), 0), n - 1);
        cursor.setAttribute("x", i * step);
        cursor.setAttribute("opacity", 0.18);
        const start = starts_[i + 1], tokens = steps.tokens[i + 1];
        const shown = inline(text.tokens.slice(start, start + tokens).join(""));
        said.replaceChildren(`Pass ${i + 2}, ${count(tokens, "token")} `, el("code", shown), ` LM ${ms(steps.lm[i + 1])}, retrieval ${ms(steps.retrieval[i + 1])}, rest ${ms(steps.rest[i + 1])}` + (steps.drafted ? `, ${steps.drafted[i + 1]} drafted` : ""));
        mark(text.tokens.length ? start : -1);
      };
      const mark = (position) => {
        if (pointed) pointed.classList.remove("here");
        pointed = null;
        for (const found of marksOf[data.texts.indexOf(text)]) {
          if (found.span && shows(found) && found.at <= position + (mode === "verify" ? 1 : 0) && position < found.at + found.n) pointed = found.span;
        }
        if (pointed) pointed.classList.add("here");
      };
      image.addEventListener("pointermove", point);
      image.addEventListener("pointerdown", point);
      image.addEventListener("pointerleave", () => {
        cursor.setAttribute("opacity", 0);
        said.textContent = usual;
        mark(-1);
      });
      return image;
    };
    const redraw = () => {
      if (!holder.isConnected || holder.drawnWidth === holder.clientWidth) return;
      holder.drawnWidth = holder.clientWidth;
      holder.replaceChildren(draw());
    };
    drawings.push(redraw);
    starts.push(redraw);
    requestAnimationFrame(redraw);
    return el("div.timeline", holder, said);
  }

  // ---- The card of a mark

  let carded = null, isPinned = false, hiding = 0;

  function acceptanceProbability(found) {
    if (!data.map) return null;
    const [s, q] = data.map, x = found / MILLION;
    if (x <= s[0]) return q[0];
    for (let i = 1; i < s.length; i++) {
      if (x <= s[i]) return q[i - 1] + (q[i] - q[i - 1]) * (x - s[i - 1]) / (s[i] - s[i - 1]);
    }
    return q[q.length - 1];
  }

  function term(list, name, ...value) {
    list.append(el("dt", name), el("dd", value));
  }

  function fillCard(span) {
    const { mark, text } = span, close = el("button.close", "✕");
    close.setAttribute("aria-label", "Close");
    close.addEventListener("click", hideCard);
    card.replaceChildren(close);
    if (mark.step !== undefined) fillDraft(mark, text);
    else fillProposal(mark, text);
  }

  function fillDraft(mark, text) {
    const { steps } = text, written = text.tokens.slice(mark.at, mark.at + mark.n).join("");
    const list = el("dl");
    term(list, "Confirmed", `${count(mark.n, "token")} after `, el("code", inline(text.tokens[mark.at - 1])));
    if (steps.drafted) term(list, "Drafted", count(steps.drafted[mark.step], "token"));
    term(list, "Pass", `number ${mark.step + 1}, LM ${ms(steps.lm[mark.step])}, retrieval ${ms(steps.retrieval[mark.step])}`);
    card.append(el("h3", el("mark", written.trim() ? visible(written) : inline(written))), el("p.state", "Drafted, and what the model itself would have written."), list);
  }

  function fillProposal(mark, text) {
    const proposal = mark.proposal, emitted = text.tokens.slice(mark.at, mark.at + mark.n).join("");
    const entry = mark.at ? text.tokens[mark.at - 1] : text.entry;
    const row = proposal ? data.rows[proposal[2]] : null;
    const chunk = row ? data.strings[row[0]] : emitted;
    const head = el(mark.accepted ? "h3" : "h3.maybe", el("span.soft", inline(entry)), el("mark", chunk.trim() ? visible(chunk) : inline(chunk)));
    const at = `at θ = ${theta().toFixed(3)}`;
    const state = mark.accepted ? (shows(mark) ? "Accepted." : `Accepted, but would not be ${at}.`)
      : isVetoed(mark) && mark.proposal[3] === REPEATS ? "Not accepted: with it the text would repeat itself."
      : isVetoed(mark) ? `Not accepted: similar enough, but the LM gives its first token less than δ = ${data.minFirstTokenProb} of the likeliest token's probability.`
      : `Not accepted, but would be ${at}.`;
    const list = el("dl");
    term(list, "Entry token", el("code", inline(entry)));
    term(list, "Similarity", (mark.similarity / MILLION).toFixed(4));
    const q = acceptanceProbability(mark.similarity);
    if (q !== null) term(list, "Acceptance probability", q.toFixed(3));
    if (proposal) term(list, "First token", `${(proposal[5] / MILLION).toFixed(3)} of the LM's likeliest`);
    if (row) {
      const isCut = mark.accepted && mark.n < row[1];
      term(list, "Length", isCut ? `${mark.n} of ${count(row[1], "token")}, cut where the text ends` : count(row[1], "token"));
      if (mark.accepted && proposal[6] !== undefined) {
        term(list, "Under the LM alone", `${Math.exp(proposal[6] / mark.n).toFixed(3)} per token`);
      } else if (!mark.accepted) {
        const agreeing = proposal[4];
        const written = inline(text.tokens.slice(mark.at, mark.at + Math.max(row[1], 1)).join(""));
        term(list, "The LM wrote", agreeing >= row[1] ? "the same" : el("code", written));
      }
    }
    card.append(head, el("p.state", state), list);
    if (row) fillSource(row);
    if (proposal && proposal[7] && proposal[7].length) {
      const rivals = proposal[7].map(([string, found]) => el("li", el("span", similarity(found)), el("code", inline(data.strings[string]))));
      card.append(el("h4", "Next-best chunks"), el("ol", rivals));
    }
  }

  function fillSource(row) {
    const [, , window_, place, segment, start, from, end, lowest] = row;
    card.append(el("h4", `Source: ${visible(data.corpus)}, window ${number(window_)}, token ${number(place)}`));
    if (segment === undefined) {
      card.append(el("p.soft", data.sourceNote || "The text around it is not there."));
      return;
    }
    const [, first, whole] = data.segments[segment];
    // A segment may hold the surroundings of many chunks.
    const before = clip(whole.slice(0, start), -300), after = clip(whole.slice(end), 300);
    card.append(el("blockquote", first > 0 || before.length < start ? "… " : null, visible(before), el("u", visible(whole.slice(start, from))), el("mark", visible(whole.slice(from, end))), visible(after), " …"));
    if (lowest !== undefined && lowest < 1) card.append(el("p.soft.small", `Its least likely token had probability ${lowest.toFixed(2)} there.`));
    const quote = card.querySelector("blockquote");
    requestAnimationFrame(() => { quote.scrollTop = quote.querySelector("mark").offsetTop - quote.offsetTop - 60; });
  }

  /** The first n characters, or the last -n, no surrogate pair cut. */
  function clip(text, n) {
    if (text.length <= Math.abs(n)) return text;
    return (n > 0 ? text.slice(0, n) : text.slice(n)).replace(/^[\udc00-\udfff]|[\ud800-\udbff]$/, "");
  }

  function showCard(span, pin) {
    clearTimeout(hiding);
    if (carded !== span || card.hidden) {
      if (carded) uncard();
      carded = span;
      fillCard(span);
      card.hidden = false;
      card.scrollTop = 0;
      span.classList.add("here");
      span.setAttribute("aria-describedby", "card");
      placeCard(span);
    }
    isPinned = isPinned && carded === span || pin;
  }

  function placeCard(span) {
    if (getComputedStyle(card).position === "fixed") {
      // At the bottom of a small screen: what was tapped stays in sight.
      const hidden = span.getBoundingClientRect().bottom + 12 - (innerHeight - card.offsetHeight);
      if (hidden > 0) scrollBy(0, hidden);
      return;
    }
    const box = span.getClientRects()[0] || span.getBoundingClientRect(), last = span.getBoundingClientRect();
    const other = span.closest(".columns").children[1], beside = other ? other.getBoundingClientRect().left : 0;
    if (beside > last.right) {
      // Over the baseline, so that what is around the chunk can be read.
      const lowest = innerHeight - card.offsetHeight - 8;
      card.style.left = `${beside - 4 + scrollX}px`;
      card.style.top = `${Math.max(Math.min(box.top - 60, lowest), 8) + scrollY}px`;
      return;
    }
    const left = Math.min(Math.max(box.left - 12, 8), document.documentElement.clientWidth - card.offsetWidth - 8);
    const fitsBelow = last.bottom + card.offsetHeight + 12 < innerHeight;
    const top = fitsBelow || last.top < card.offsetHeight + 12 ? last.bottom + 8 : last.top - card.offsetHeight - 8;
    card.style.left = `${left + scrollX}px`;
    card.style.top = `${top + scrollY}px`;
  }

  function uncard() {
    if (!carded) return;
    carded.classList.remove("here");
    carded.removeAttribute("aria-describedby");
    carded = null;
  }

  function hideCard() {
    clearTimeout(hiding);
    uncard();
    isPinned = false;
    card.hidden = true;
  }

  const markAt = (event) => {
    const span = event.target instanceof Element ? event.target.closest(".seen") : null;
    return span && (span.mark.accepted || shows(span.mark) || isVetoed(span.mark)) ? span : null;
  };

  function listen() {
    page.addEventListener("pointerover", (event) => {
      const span = markAt(event);
      if (event.pointerType === "mouse" && span && !isPinned) showCard(span, false);
    });
    page.addEventListener("pointerout", (event) => {
      if (event.pointerType === "mouse" && markAt(event) && !isPinned) hiding = setTimeout(hideCard, 220);
    });
    card.addEventListener("pointerenter", () => clearTimeout(hiding));
    card.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse" && !isPinned) hiding = setTimeout(hideCard, 220);
    });
    document.addEventListener("click", (event) => {
      const span = markAt(event);
      if (span) showCard(span, true);
      else if (!card.contains(event.target)) hideCard();
    });
    // A press moves the focus too; the card waits for the click then, so as not to come up under the finger.
    let isPressed = false;
    document.addEventListener("pointerdown", () => { isPressed = true; }, true);
    // Not at pointerup: of a touch the focus comes after it, and before the click.
    for (const kind of ["click", "pointercancel", "keydown"]) {
      document.addEventListener(kind, () => { isPressed = false; }, true);
    }
    page.addEventListener("focusin", (event) => {
      const span = markAt(event);
      if (span && !isPressed) showCard(span, true);
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hideCard();
      const span = markAt(event);
      const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!span || !way) return;
      event.preventDefault();
      const reachable = [...span.closest("article").querySelectorAll(".seen[tabindex]")];
      const next = reachable[reachable.indexOf(span) + way];
      if (!next) return;
      span.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
    let resizing = 0, closed = [];
    addEventListener("resize", () => {
      cancelAnimationFrame(resizing);
      resizing = requestAnimationFrame(() => {
        for (const draw of drawings) draw();
        if (carded) placeCard(carded);
      });
    });
    addEventListener("beforeprint", () => {
      hideCard();
      for (const each of articles) each.upgrade();
      for (const draw of drawings) draw();
      for (const each of articles) if (each.shownAt !== moved) recolour(each);
      closed = [...document.querySelectorAll("details:not([open])")];
      for (const each of closed) each.open = true;
    });
    addEventListener("afterprint", () => {
      for (const each of closed) each.open = false;
    });
  }

  // ---- The page

  const starts = [];
  const inView = new Set();
  const articles = data.texts.map(article);

  const charts = mode === "verify" ? [positionsChart(), passesChart(), timeChart()] : [similarityChart(), lengthsChart(), timeChart()];
  const notes = [];
  if (mode === "chunk" && data.texts.some((text) => !text.steps)) notes.push("Some of these texts were generated before steps were recorded: their proposals were found again from the text, and their times are not known step by step.");
  if (mode === "verify" && data.texts.some((text) => !text.steps)) notes.push("Some of these texts were generated before steps were recorded, so what was drafted is not known.");
  if (data.leftOut) notes.push(`To keep the page small, ${count(data.leftOut, "text")} more ${data.leftOut === 1 ? "is" : "are"} not shown; figures and charts count all.`);
  if (data.sourceNote) notes.push(data.sourceNote);
  if (allProposals.length) notes.push("The slider shows which proposals another θ would accept, step by step. The texts stay as they are; in truth they would go on differently from the first change on.");

  put(page, [
    el("h1", visible(data.title)),
    el("p.lead", lead()),
    tiles(),
    charts.some((each) => each) ? el("div.charts", charts) : null,
    el("div.folds", figuresTable(), facts()),
    el("div.texts-head", el("h2", "Texts"), jump()),
    notes.map((note) => el("p.soft.small", visible(note))),
    bar(),
    articles,
  ]);
  for (const draw of drawings) draw();
  for (const start of starts.splice(0)) start();
  listen();

  // A text is plain until it comes near the screen.
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        inView.add(entry.target);
        entry.target.upgrade();
        if (entry.target.shownAt !== moved) recolour(entry.target);
      } else {
        inView.delete(entry.target);
      }
    }
  }, { rootMargin: "600px" });
  for (const each of articles) observer.observe(each);
})();
