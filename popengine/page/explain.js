"use strict";
// The page of one recorded run. A frame is a new token: frame 0 came from the prompt, every other from a step.
// What a model or a user wrote goes into the page as text alone (textContent), never as markup.

// The data of the run; `begin` fills them.
let run, frames, last, rows, drawn, prunes, decides, chooses, isMixture;
const byId = id => document.getElementById(id);
const percent = value => (100 * value).toFixed(1) + " %";
const round = value => (100 * value).toFixed(0) + " %";
const megabytes = value => (value / 1e6).toFixed(1) + " MB";
const frameOf = {first: 0, playing: false, fade: 1};
let frame = 0, selected = 0, spot = null, pinned = false, colours = {}, layout = null, began = 0, drawnFrames = 0;

// ---- the data: bytes to arrays ----

async function inflated(text) {
  // JSON that was compressed with zlib and written in base64.
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

async function readRun() {
  const [rest, ...layers] = await Promise.all(JSON.parse(byId("data").textContent).map(inflated));
  run = {...rest, layers};
  frames = run.frames;
  last = frames.length - 1;
  rows = run.layers.flatMap(layer => layer.networks.map(network => unpacked(layer, network)));
  drawn = rows.filter(row => row.drawings.length);
  prunes = drawn.length > 0;
  decides = rows.some(row => row.picks < row.candidate);
  chooses = decides || run.heads.some(line => line.includes("c"));
  isMixture = run.experts.length > 0;
}

function bytesOf(text) {
  return Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
}

function unpacked(layer, network) {
  const row = {...network, layer: layer.index, skipped: layer.skipped};
  row.resident = row.retained + row.candidate;
  row.active = row.retained + row.picks;
  row.name = `layer ${layer.index}` + (network.expert === null ? "" : network.expert === "shared" ? ", shared expert" : `, expert ${network.expert}`);
  row.drawings = network.drawings.map(one => {
    const halves = new Uint16Array(bytesOf(one.scores).buffer), words = new Uint32Array(halves.length);
    halves.forEach((half, index) => { words[index] = half << 16; });                // bfloat16 is the upper half of a float
    return {frame: one.frame, order: new Int32Array(bytesOf(one.order).buffer), scores: new Float32Array(words.buffer)};
  });
  row.picked = masksOf(network.picked, row.candidate);
  row.wanted = masksOf(network.wanted, row.channels);
  row.times = new Uint16Array(row.channels);                                        // by channel: how often it was picked
  for (const [at, mask] of row.picked) {
    const order = drawingOf(row, at).order;
    for (let place = 0; place < row.candidate; place++) if (bit(mask, place)) row.times[order[row.retained + place]]++;
  }
  row.missed = new Map();
  for (const [at, mask] of row.wanted) {
    let count = 0;
    for (let column = row.resident; column < row.channels; column++) count += bit(mask, column);
    row.missed.set(at, count / row.active);
  }
  return row;
}

function masksOf(packed, columns) {
  const bytes = bytesOf(packed.bits), each = Math.ceil(columns / 8);
  return new Map(packed.frames.map((at, index) => [at, bytes.subarray(index * each, (index + 1) * each)]));
}

function bit(mask, place) { return (mask[place >> 3] >> (place & 7)) & 1; }

function drawingOf(row, at) {
  // The partition that holds for a step; at frame 0 the one that the prompt has just drawn.
  let found = null;
  for (const one of row.drawings) if (one.frame < at || (at === 0 && one.frame === 0)) found = one;
  return found;
}

function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : 0;
}

// ---- what stays as it is ----

function endMark() {
  const mark = document.createElement("span");
  mark.className = "parts";
  mark.textContent = "(end)";
  return mark;
}

function visible(text) {
  return text === "" ? "·" : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
}

function said(one) {
  // A token that adds nothing to the text, as a byte of a character, by itself.
  return visible(one.text || one.written);
}

function fillText() {
  // Tokens are spans, not buttons: a line break inside a button would not break the line of the text.
  const answer = byId("answer"), prompt = byId("prompt"), dense = byId("dense-answer");
  const {tokens, first_difference: parting, finish_reason: ended} = run.dense_answer;
  frames.forEach((one, at) => {
    const token = document.createElement("span");
    token.textContent = one.text;
    token.dataset.at = at;
    answer.append(token);
  });
  tokens.forEach((one, at) => {
    const token = document.createElement("span");
    token.textContent = one.text;
    token.className = at === parting ? "parts" : parting !== null && at > parting ? "" : "alike";
    dense.append(token);
  });
  if (parting !== null) {
    if (parting < frames.length) answer.children[parting].dataset.parts = "";
    else answer.append(endMark());
    if (parting >= tokens.length) dense.append(endMark());
  }
  const both = tokens.map(one => one.text).join("") === "" ? "" : ` The dense answer ended after ${tokens.length} tokens (${ended === "stop" ? "end of sequence" : "as many as asked for"}).`;
  const shown = (list, at) => at < list.length ? `“${said(list[at])}”` : "an end";
  byId("parting").textContent = (parting === null
    ? `Both answers are the same, token for token (${frames.length}).`
    : `Framed: the first difference, token ${parting + 1}, where this run has ${shown(frames, parting)} and the dense model has ${shown(tokens, parting)}.` + (parting < Math.min(frames.length, tokens.length) ? " After it the two go on from different texts." : ""))
    + both + (run.greedy ? "" : " This run was sampled and the dense answer is greedy: a difference may come from sampling alone.");
  const most = Math.max(...run.prompt.map(one => one.share), 1e-9);
  let chip = null, images = 0;
  for (const one of run.prompt) {
    const span = document.createElement("span");
    if (one.image) {
      images++;
      if (!chip) { chip = span; span.className = "image-tokens"; prompt.append(span); }
      chip.textContent = `${images} image tokens`;
      continue;
    }
    span.textContent = one.text;
    span.title = `${percent(one.share)} of the scores`;
    span.style.backgroundColor = `rgba(var(--shade), ${0.75 * Math.sqrt(one.share / most)})`;
    prompt.append(span);
  }
  byId("prompt-count").textContent = `${run.prompt.length} tokens` + (images ? `, ${images} of them of images` : "");
  byId("prompt-box").open = run.prompt.length <= 60;
}

function fillWords() {
  const facts = run.statistics, pruning = facts.pruning, steps = frames.slice(1);
  byId("about").textContent = `${run.model}, ${run.prompt.length} prompt tokens and ${frames.length} new ones; `
    + `${percent(pruning.ratio)} of a layer's weights left out of a step, ${facts.weights} weights, ${facts.dtype}, ${facts.device}`;
  byId("verdict").textContent = meaning();
  const spare = rows.find(row => row.drawings.length) || rows[0];
  const words = {
    pop: "Which channels are candidates was decided by the prompt.",
    "all-channels": "This rule has no pruned channels and no decision by the prompt: every step asks all channels again and runs the best, which saves little reading. Columns are still in the prompt's order.",
  };
  byId("rule-words").textContent = !prunes ? "This run prunes no channels: there is no partition of them to show."
    : !decides ? "This run decides nothing at its steps: the prompt's choice is frozen, and there are no candidates."
    : `${run.rule === "pop" ? "" : `Rule “${run.rule}”. `}${words[run.rule] || (spare.candidate === spare.channels ? "It has no partition by the prompt: every step ranks all channels by a cheaper score of its own." : "It scores otherwise than the formula above; the columns are in its partition's order.")}`;
  const notes = [];
  if (run.layers_in_all > run.layers.length) notes.push(`The model has ${run.layers_in_all} layers; this page has room for ${run.layers.length} of them, evenly spread (the others ran all the same, and their bytes count).`);
  const skipped = run.layers.filter(layer => layer.skipped).map(layer => layer.index);
  if (skipped.length) notes.push(`Layers ${skipped.join(", ")} were skipped by the prompt (Prefill-Only pruning), all but its last ${pruning.boundary_tokens}; they are marked ○, and their scores come from those tokens alone.`);
  if (!prunes) notes.push("No channel is pruned in this run, so there are no regions to colour.");
  if (prunes && steps.length && steps.every(one => one.bytes >= one.dense_bytes)) notes.push("Weights of this form are kept in packed groups, which break where single channels are taken out of them: a copy of the channels that stay would be no smaller than the whole. So these steps read everything: pruned channels are left out of the result, not of the reading.");
  if (frames.length && prunes && drawn.some(row => row.drawings[0].frame > 0) && !isMixture) notes.push(`Until step ${drawn[0].drawings[0].frame} there was too little evidence to draw a partition: those steps were dense.`);
  if (run.greedy && run.replayed_alike < frames.length) notes.push(`Picks were recorded by running the same tokens once more; by rounding, ${frames.length - run.replayed_alike} of its ${frames.length} first choices differ from the run's.`);
  byId("map-note").textContent = notes.join(" ");
  byId("row-name").textContent = isMixture ? "layer's expert" : "layer";
  byId("one-name").textContent = isMixture ? "network" : "layer";
  const dense = steps.filter(one => one.dense_step).length, redrawn = steps.filter(one => one.redrawn).length;
  byId("special-steps").textContent = dense ? `${dense} steps ran dense to gather evidence (marked below), and ${redrawn} of them drew the partition anew.` : "";
  byId("settings").textContent = JSON.stringify(facts.pruning, null, 1).replace(/[{}"]/g, "");
  fillWrong();
}

function meaning() {
  // One sentence about this run, from its own numbers, and the reason if it was not faster.
  const steps = frames.slice(1), agreed = frames.filter(one => one.agrees).length;
  if (!steps.length) return `This run has one new token, which the prompt gave: there is no step to watch. ${agreed ? "Dense would have said it too." : "Dense would have said another."}`;
  const read = mean(steps.map(one => one.bytes / one.dense_bytes)), time = middle(steps.map(one => one.ms)) / middle(steps.map(one => one.dense_ms));
  const pruned = drawn.filter(row => row.picked.size), parts = [];
  if (pruned.length) {
    const of = name => round(mean(pruned.map(row => row[name] / row.channels)));
    const [reads, runs, channels] = ["resident", "active", "channels"].map(name => pruned.map(row => row[name]));
    const one = values => Math.min(...values) === Math.max(...values);
    parts.push([reads, runs, channels].every(one)
      ? `read ${reads[0].toLocaleString("en")} of the ${channels[0].toLocaleString("en")} channels of a network and ran ${runs[0].toLocaleString("en")} of them`
      : `read ${of("resident")} of the channels of a network and ran ${of("active")} of them`);
    const changes = pruned.flatMap(row => Object.values(row.changed)), kept = pruned.flatMap(row => Object.values(row.left_out).map(pair => 1 - pair[0]));
    if (decides && changes.length) parts.push(`changed ${round(mean(changes))} of its picks from the step before`);
    if (kept.length) parts.push(`kept ${percent(mean(kept))} of the importance (of the squared scores that the dense model has there)`);
  }
  parts.push(`took ${percent(read)} of the dense model's bytes and ${percent(time)} of its time (median)`);
  const same = `${agreed} of ${frames.length} tokens are what the dense model would have said`;
  return `In this run a step ${parts.length > 1 ? parts.slice(0, -1).join(", ") + ", and " : ""}${parts.at(-1)}; ${same}.`
    + (!prunes && !run.heads.length ? " Nothing is pruned: both are the same model, and their times differ by what else the machine did."
      : time <= 1 ? ""
      : chooses ? " Here it was not faster: on a model and a machine like this, choosing among candidates costs more than " + (read < 1 ? "not reading the others saves." : "what it saves; nothing was left unread.")
      : " Here it was not faster, although its steps choose nothing: " + (read < 1 ? "on a model and a machine like this, what they do not read is too little to show." : "nothing was left unread."));
}

function middle(values) {
  return values.slice().sort((a, b) => a - b)[values.length >> 1] || 0;
}

function fillWrong() {
  const item = text => { const one = document.createElement("li"); one.textContent = text; byId("worst").append(one); };
  const measured = drawn.filter(row => row.missed.size);
  if (!measured.length) {
    byId("wrong").textContent = "There is no partition, or no step, in this run that could be wrong.";
    return;
  }
  if (measured.every(row => row.resident === row.channels)) {
    byId("wrong").textContent = "In this run no channel is out of a step's reach: the prompt prunes none for good, so it could not be wrong about one.";
    return;
  }
  const share = mean(measured.map(row => mean([...row.missed.values()])));
  const chance = mean(measured.map(row => (row.channels - row.resident) / row.channels));
  const most = mean(measured.map(row => Math.min(1, (row.channels - row.resident) / row.active)));
  byId("wrong").textContent = `The partition is right where the dense model wants no pruned channel. Of the channels that it `
    + `wanted at a step, ${percent(share)} were pruned here; a partition by chance would have pruned ${percent(chance)} of them, `
    + `and it could be ${percent(most)} at most.`;
  const lost = which => mean(measured.map(row => mean(Object.values(row.left_out).map(pair => pair[which]))));
  item(`Not every missed channel matters much. Weighed by their squared scores, the channels that a step did not run make `
    + `${percent(lost(0))} of a layer's total; the same number of channels, chosen freely among all at every token, would have left out ${percent(lost(1))}. Retained channels that a token did not want, and candidates that lost, are the rest of the difference.`);
  const byLayer = measured.map(row => [mean([...row.missed.values()]), row]).sort((a, b) => b[0] - a[0]);
  item(`Worst: ${byLayer.slice(0, 3).map(([value, row]) => `${row.name} (${percent(value)})`).join("; ")}. Best: ${byLayer.slice(-1).map(([value, row]) => `${row.name} (${percent(value)})`)[0]}.`);
  const perStep = frames.map((_, at) => [mean(measured.filter(row => row.missed.has(at)).map(row => row.missed.get(at))), at]).slice(1).sort((a, b) => b[0] - a[0]);
  item(`Steps that missed most: ${perStep.slice(0, 4).map(([value, at]) => `token ${at + 1} “${said(frames[at])}” (${percent(value)})`).join("; ")}.`);
  const off = frames.map((one, at) => [one, at]).filter(([one]) => !one.agrees);
  item(off.length ? `Tokens that dense would not have said: ${off.slice(0, 8).map(([one, at]) => `${at + 1} “${said(one)}” (dense: “${visible(one.dense_likeliest)}”)`).join(", ")}${off.length > 8 ? ` and ${off.length - 8} more` : ""}.` : "Every token is what dense would have said: none of what was missed changed the text.");
  const never = measured.reduce((sum, row) => { let count = 0; if (row.picked.size) for (const at of drawingOf(row, last)?.order.subarray(row.retained, row.resident) || []) count += row.times[at] === 0; return sum + count; }, 0);
  const always = measured.reduce((sum, row) => { let count = 0; if (row.picked.size) for (const at of drawingOf(row, last)?.order.subarray(row.retained, row.resident) || []) count += row.times[at] === row.picked.size; return sum + count; }, 0);
  const all = measured.reduce((sum, row) => sum + (row.picked.size ? row.candidate : 0), 0);
  if (decides && all) item(`Candidates that every step picked: ${percent(always / all)}; that none picked: ${percent(never / all)}. These the prompt could have decided; the rest are why a step asks again.`);
}

function fillTable() {
  const table = byId("table");
  table.replaceChildren();
  const line = (cells, kind) => {
    const row = table.insertRow();
    for (const text of cells) { const cell = document.createElement(kind); cell.textContent = text; row.append(cell); }
  };
  line(["layer", "moved", "changed", "missed", "left out, weighed"], "th");
  for (const row of rows) {
    const of = (values, show) => values === undefined ? "–" : show(values);
    line([row.name, of(row.moved[frame], value => value.toFixed(3)), of(row.changed[frame], percent), of(row.missed.get(frame), percent), of(row.left_out[frame]?.[0], percent)], "td");
  }
}

// ---- drawing ----

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ground", "ink", "soft", "line", "retained", "candidate", "picked", "pruned", "missed", "ours", "dense", "moved", "changed"]) {
    const text = style.getPropertyValue("--" + name).trim();
    colours[name] = text;
    colours[name + "3"] = [1, 3, 5].map(place => parseInt(text.slice(place, place + 2), 16));
  }
}

function fit(canvas, height) {
  // The canvas in device pixels; what is drawn is in CSS pixels.
  const scale = window.devicePixelRatio || 1, width = canvas.clientWidth;
  if (height) canvas.style.height = height + "px";
  const high = height || canvas.clientHeight;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(high * scale);
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  return {pen, width, height: high, scale};
}

function layOut() {
  const canvas = byId("map"), narrow = canvas.clientWidth < 560;
  const high = Math.max(isMixture ? 4 : 8, Math.min(24, Math.floor(400 / rows.length)));
  const left = narrow ? 40 : 50, bars = narrow ? [24, 24, 24] : [64, 64, 64], gap = narrow ? 8 : 14;
  layout = {high, left, top: 34, bars, gap, right: bars.reduce((sum, one) => sum + one + gap, 0)};
  layout = {...layout, ...fit(canvas, layout.top + high * rows.length + 36)};
  layout.columns = Math.max(1, Math.floor((layout.width - layout.left - layout.right) * layout.scale));
  layout.strip = document.createElement("canvas");
  layout.strip.width = layout.columns;
  layout.strip.height = rows.length;
  layout.image = layout.strip.getContext("2d").createImageData(layout.columns, rows.length);
}

function paintRow(index, fade) {
  // One line of pixels: each the mean colour of the channels that fall on it.
  const row = rows[index], pixels = layout.image.data, columns = layout.columns;
  const start = index * columns * 4, drawing = drawingOf(row, frame);
  const picked = row.picked.get(frame), wanted = row.wanted.get(frame);
  const before = frameOf.before !== undefined && drawingOf(row, frameOf.before) === drawing ? row.picked.get(frameOf.before) : undefined;
  const dim = isMixture && frame > 0 && !picked && decides ? 90 : 255;
  const [retained, candidate, lit, pruned, missed] = ["retained3", "candidate3", "picked3", "pruned3", "missed3"].map(name => colours[name]);
  for (let x = 0; x < columns; x++) {
    const from = Math.floor(x * row.channels / columns), to = Math.max(from + 1, Math.floor((x + 1) * row.channels / columns));
    let red = 0, green = 0, blue = 0;
    for (let column = from; column < to; column++) {
      let colour = pruned, share = 1;
      if (!drawing && prunes) colour = candidate;
      else if (column < row.retained) colour = retained;
      else if (column < row.resident) {
        const place = column - row.retained;
        if (picked && bit(picked, place)) colour = lit;
        else {
          colour = candidate;
          if (before && bit(before, place)) share = fade;                           // picked a step ago, and fading
        }
      } else if (wanted && bit(wanted, column)) colour = missed;
      red += colour[0] * share + lit[0] * (1 - share);
      green += colour[1] * share + lit[1] * (1 - share);
      blue += colour[2] * share + lit[2] * (1 - share);
    }
    const at = start + 4 * x, count = to - from;
    pixels[at] = red / count; pixels[at + 1] = green / count; pixels[at + 2] = blue / count; pixels[at + 3] = dim;
  }
}

function drawMap() {
  const {pen, width, height, left, top, high, columns, scale, bars, gap, right, strip, image} = layout;
  for (let index = 0; index < rows.length; index++) paintRow(index, frameOf.fade);
  strip.getContext("2d").putImageData(image, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(strip, left, top, columns / scale, high * rows.length);
  const space = high > 7 ? 1 : 0, wide = columns / scale, under = top + high * rows.length;
  for (let index = 0; space && index <= rows.length; index++) pen.clearRect(left, top + index * high - space, wide, space);
  mapAxes(wide, under);
  const every = Math.ceil(13 / high), narrow = width < 560;
  const scales = {moved: [1 / 3, "⅓"], changed: [1, "100 %"], missed: [Math.max(0.1, frameOf.mostMissed), round(Math.max(0.1, frameOf.mostMissed))]};
  let x = width - right + gap;
  ["moved", "changed", "missed"].forEach((name, which) => {
    pen.fillStyle = colours[name];
    pen.textAlign = "left";
    pen.fillText(narrow ? ["mov.", "chg.", "miss"][which] : name, x, top - 10);
    rows.forEach((row, index) => {
      const value = name === "missed" ? row.missed.get(frame) : row[name][frame];
      pen.globalAlpha = 0.22;
      pen.fillRect(x, top + index * high, bars[which], Math.max(1, high - 2));
      pen.globalAlpha = 1;
      if (value !== undefined) pen.fillRect(x, top + index * high, Math.min(1, value / scales[name][0]) * bars[which], Math.max(1, high - 2));
    });
    pen.fillStyle = colours.soft;
    if (!narrow) pen.fillText("0", x, under + 9);
    pen.textAlign = narrow ? "center" : "right";
    pen.fillText(narrow ? scales[name][1].replace(" ", "") : scales[name][1], narrow ? x + bars[which] / 2 : x + bars[which], under + 9);
    x += bars[which] + gap;
  });
  pen.textAlign = "right";
  rows.forEach((row, index) => {
    const first = index === 0 || rows[index - 1].layer !== row.layer;
    pen.fillStyle = index === selected ? colours.picked : colours.soft;
    const near = Math.abs(index - selected) < every && index !== selected;
    const shows = isMixture ? first : (index % every === 0 && !near) || index === selected;
    if (shows) pen.fillText((row.skipped ? "○" : "") + row.layer, left - 7, top + (index + 0.5) * high);
  });
  pen.strokeStyle = colours.ink;
  pen.lineWidth = 1.5;
  pen.strokeRect(left - 1, top + selected * high - 1.5, columns / scale + 2, high + 1);
  if (spot) {
    const at = left + (spot.column + 0.5) / rows[spot.row].channels * columns / scale;
    pen.fillStyle = colours.ink;
    pen.fillRect(at - 0.75, top, 1.5, spot.row * high);
    pen.fillRect(at - 0.75, top + (spot.row + 1) * high, 1.5, (rows.length - spot.row - 1) * high);
  }
  drawnFrames++;
}

function mapAxes(wide, under) {
  // Names and units of the map's axes: channels by place across, layers down, and the regions above.
  const {pen, left, top} = layout, row = rows[selected], at = place => left + place / row.channels * wide;
  pen.fillStyle = colours.soft;
  pen.textAlign = "left";
  pen.fillText("layer", 0, top - 10);
  pen.strokeStyle = colours.soft;
  pen.lineWidth = 1;
  pen.textAlign = "center";
  for (const place of ticks(row.channels, wide, 60)) {
    pen.beginPath(); pen.moveTo(at(place), under); pen.lineTo(at(place), under + 3); pen.stroke();
    if (at(place) < left + wide - 14) pen.fillText(place.toLocaleString("en"), at(place), under + 9);
  }
  pen.fillText(wide < 360 ? "channel, by place: best → worst" : "channel, by its place in the prompt's order: best on the left", left + wide / 2, under + 25);
  if (!prunes) return;
  const regions = [["retained", 0, row.retained], ["candidates", row.retained, row.resident], ["pruned", row.resident, row.channels]];
  for (const [name, from, to] of regions) {
    const space = at(to) - at(from), words = space > 110 ? `${name} ${(to - from).toLocaleString("en")}` : name;
    if (space > pen.measureText(words).width + 6) pen.fillText(words, (at(from) + at(to)) / 2, top - 10);
    if (from) { pen.beginPath(); pen.moveTo(at(from), top - 5); pen.lineTo(at(from), top - 1); pen.stroke(); }
  }
}

function ticks(most, length, apart) {
  // Round numbers from 0 to `most`, at least `apart` pixels from each other on an axis of that length.
  const least = Math.max(most * apart / Math.max(length, 1), 1e-9), power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map(one => one * power).find(one => one >= least), found = [];
  for (let value = 0; value <= most * (1 + 1e-9); value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

function axes(canvas, x, y, first = 0, top = 24) {
  // A frame with named axes. x, y: {name, most, show}; x runs from `first`. Returns the pen and the places of values.
  const {pen, width, height} = fit(canvas), box = {left: 44, right: width - 10, top, bottom: height - 36};
  const across = value => box.left + (value - first) / Math.max(x.most - first, 1e-9) * (box.right - box.left);
  const up = value => box.bottom - Math.min(1, value / y.most) * (box.bottom - box.top);
  pen.clearRect(0, 0, width, height);
  pen.fillStyle = colours.soft;
  pen.lineWidth = 1;
  pen.textAlign = "left";
  pen.fillText(y.name, 0, 9);
  pen.textAlign = "right";
  for (const value of ticks(y.most, box.bottom - box.top, 26)) {
    pen.strokeStyle = colours.line;
    pen.beginPath(); pen.moveTo(box.left, up(value)); pen.lineTo(box.right, up(value)); pen.stroke();
    pen.fillText(y.show(value), box.left - 6, up(value));
  }
  pen.strokeStyle = colours.soft;
  pen.beginPath(); pen.moveTo(box.left, box.top); pen.lineTo(box.left, box.bottom); pen.lineTo(box.right, box.bottom); pen.stroke();
  pen.textAlign = "center";
  for (const value of [...new Set([first, ...ticks(x.most, box.right - box.left, 55).filter(one => one > first)])]) {
    if (value !== first && across(value) - box.left < 24) continue;
    pen.beginPath(); pen.moveTo(across(value), box.bottom); pen.lineTo(across(value), box.bottom + 3); pen.stroke();
    pen.fillText(value.toLocaleString("en"), across(value), box.bottom + 10);
  }
  pen.fillText(x.name, (box.left + box.right) / 2, box.bottom + 26);
  return {pen, across, up, box};
}

function drawCurve() {
  const row = rows[selected], drawing = drawingOf(row, frame), canvas = byId("curve");
  if (!drawing) {
    const {pen, width, height} = fit(canvas);
    pen.clearRect(0, 0, width, height);
    pen.fillStyle = colours.soft;
    pen.fillText(prunes ? "No partition is drawn here yet." : "No channel is pruned in this run.", 4, 20);
    return;
  }
  const logs = Array.from(drawing.scores, score => Math.log10(Math.max(score, 1e-12)));
  const sorted = logs.slice().sort((a, b) => a - b), low = sorted[Math.floor(sorted.length * 0.002)], high = sorted[sorted.length - 1];
  const {pen, across, box} = axes(canvas, {name: "channel, by its place in the prompt's order", most: row.channels}, {name: "score over the prompt (no unit, log scale)", most: 0, show: String}, 0, 38);
  const picked = row.picked.get(frame), wanted = row.wanted.get(frame), bottom = box.bottom - 20, each = (box.right - box.left) / row.channels;
  const height = log => Math.max(0, (log - low) / (high - low || 1)) * (bottom - box.top);
  pen.clearRect(box.left + 1, box.top - 1, box.right, box.bottom - box.top);
  pen.clearRect(0, box.top - 6, box.left - 1, box.bottom - box.top + 12);
  for (let column = 0; column < row.channels; column++) {
    const x = across(column), tall = height(logs[column]);
    const region = column < row.retained ? "retained" : column < row.resident ? "candidate" : "pruned";
    const lit = region === "candidate" && picked && bit(picked, column - row.retained);
    const lost = region === "pruned" && wanted && bit(wanted, column);
    pen.fillStyle = colours[region];
    pen.fillRect(x, bottom - tall, Math.max(each, 0.6), tall);
    if (lit || lost) { pen.fillStyle = colours[lit ? "picked" : "missed"]; pen.fillRect(x, bottom + 4, Math.max(each, 1), 14); }
  }
  pen.strokeStyle = colours.line;
  pen.textAlign = "right";
  for (let power = Math.ceil(low); power <= high; power++) {
    const y = bottom - height(power);
    pen.beginPath(); pen.moveTo(box.left, y); pen.lineTo(box.right, y); pen.stroke();
    pen.fillStyle = colours.soft;
    pen.fillText(power > 3 || power < -3 ? `10^${power}` : String(10 ** power), box.left - 6, y);
  }
  pen.textAlign = "center";
  for (const [name, from, to] of [["retained", 0, row.retained], ["candidates", row.retained, row.resident], ["pruned", row.resident, row.channels]]) {
    const words = `${name} ${to - from}`, fits = (to - from) * each > pen.measureText(words).width + 8;
    pen.fillStyle = colours.soft;
    if (fits) pen.fillText(words, across((from + to) / 2), box.top - 7);
  }
}

function drawLines(canvas, series, y) {
  // Lines over the new tokens, with a cursor at the present one. series: [colour, value of a frame or undefined]
  const {pen, across, up, box} = axes(canvas, {name: "new token", most: last + 1}, y, 1), place = at => across(at + 1);
  for (const [colour, value] of series) {
    pen.strokeStyle = pen.fillStyle = colours[colour];
    pen.lineWidth = 1.6;
    pen.beginPath();
    let count = 0, only = null;
    for (let at = 0; at <= last; at++) {
      const found = value(at);
      if (found === undefined) continue;                        // an expert that was not reached: the line goes on after it
      if (count++) pen.lineTo(place(at), up(found)); else { pen.moveTo(place(at), up(found)); only = [place(at), up(found)]; }
    }
    pen.stroke();
    if (count === 1) { pen.beginPath(); pen.arc(...only, 3, 0, 7); pen.fill(); }
  }
  pen.fillStyle = colours.ink;
  pen.globalAlpha = 0.5;
  pen.fillRect(place(frame) - 0.75, box.top, 1.5, box.bottom - box.top);
  pen.globalAlpha = 1;
  return {pen, across: place, up, box};
}

function drawHistory() {
  const row = rows[selected];
  const most = Math.max(0.34, ...Object.values(row.changed), ...Object.values(row.moved), ...row.missed.values());
  drawLines(byId("history"), [["changed", at => row.changed[at]], ["moved", at => row.moved[at]], ["missed", at => row.missed.get(at)]],
    {name: "share, %", most: Math.min(1, most), show: value => String(Math.round(100 * value))});
}

function drawChances() {
  const series = [["dense", at => frames[at].dense_probability], ["ours", at => frames[at].probability]];
  const {pen, across, up} = drawLines(byId("chances"), series, {name: "probability of the token, %", most: 1, show: value => String(Math.round(100 * value))});
  pen.fillStyle = colours.missed;
  frames.forEach((one, at) => { if (!one.agrees) { pen.beginPath(); pen.arc(across(at), up(one.probability), 3.2, 0, 7); pen.fill(); } });
}

function drawTimes() {
  const steps = frames.slice(1), all = steps.flatMap(one => [one.ms, one.dense_ms]).sort((a, b) => a - b);
  const most = 1.25 * (all[Math.floor(all.length * 0.98)] || 1);
  const of = name => at => at ? frames[at][name] : undefined;
  const {pen, across, box} = drawLines(byId("times"), [["dense", of("dense_ms")], ["ours", of("ms")]], {name: "time of the step, ms", most, show: String});
  frames.forEach((one, at) => {
    if (one.dense_step) { pen.fillStyle = colours[one.redrawn ? "missed" : "retained"]; pen.fillRect(across(at) - 1.5, box.bottom - 5, 3, 5); }
  });
}

function drawGrid(canvas, cells, name, colour) {
  // A square per expert or head, a line per layer. cells: per layer, how many; name of one; colour of one
  const most = Math.max(...cells), {pen, width} = fit(canvas, 50 + cells.length * 16);
  const side = Math.min(16, (width - 40) / most);
  pen.clearRect(0, 0, width, 50 + cells.length * 16);
  pen.fillStyle = colours.soft;
  pen.fillText("layer", 0, 8);
  pen.textAlign = "center";
  for (const one of ticks(most - 1, (most - 1) * side, 24)) if (Number.isInteger(one)) pen.fillText(String(one), 34 + (one + 0.5) * side - 1, 26 + cells.length * 16);
  pen.textAlign = "left";
  pen.fillText(name, 34, 42 + cells.length * 16);
  cells.forEach((count, line) => {
    pen.fillStyle = colours.soft;
    pen.fillText(String(line), 0, 26 + line * 16);
    for (let one = 0; one < count; one++) {
      pen.fillStyle = colours[colour(line, one)];
      pen.fillRect(34 + one * side, 18 + line * 16, Math.max(1, side - 2), 14);
    }
  });
}

function drawExperts() {
  if (!isMixture) return;
  const counts = run.statistics.experts, chosen = frame ? run.experts[frame - 1] : [];
  const cells = run.experts[0].map((_, layer) => (counts.find(one => one.layer === layer) || {picks: []}).picks.length);
  drawGrid(byId("experts"), cells, "expert of the layer", (layer, expert) => chosen[layer]?.includes(expert) ? "picked" : "pruned");
}

function drawHeads() {
  if (!run.heads.length) return;
  const names = {r: "retained", c: "candidate", p: "pruned"};
  drawGrid(byId("heads"), run.heads.map(line => line.length), "attention head of the layer", (layer, head) => names[run.heads[layer][head]]);
}

function showPictures() {
  // Image tokens lie over the picture line by line. Some towers put a summary before them, or leave the first out.
  const tokens = run.prompt.filter(one => one.image);
  let first = 0;
  run.pictures.forEach(({address, tokens: each, rows: lines, columns: across}, which) => {
    const more = each - lines * across, own = tokens.slice(first + Math.max(0, more), first += each);
    const canvas = document.createElement("canvas"), words = document.createElement("p"), picture = new Image();
    words.className = "small";
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Picture ${which + 1} with its ${each} image tokens`);
    byId("pictures").append(canvas, words);
    words.textContent = `Picture ${which + 1} as the model sees it: ${lines} × ${across} image tokens. The brighter a square, the more of the channels' scores comes from it.`;
    picture.onload = () => {
      const size = Math.min(300, canvas.clientWidth), high = size * picture.height / picture.width, {pen} = fit(canvas, high);
      canvas.style.width = size + "px";
      pen.imageSmoothingEnabled = picture.width > 150;
      pen.drawImage(picture, 0, 0, size, high);
      const most = Math.max(...own.map(one => one.share), 1e-12);
      own.forEach((one, token) => {
        const index = token + Math.max(0, -more);
        pen.fillStyle = `rgba(17, 21, 27, ${0.72 * (1 - Math.sqrt(one.share / most))})`;
        pen.fillRect(index % across * size / across, Math.floor(index / across) * high / lines, size / across - 1, high / lines - 1);
      });
    };
    picture.src = address;
  });
}

// ---- one frame ----

function describeSpot() {
  if (!spot) return;
  const row = rows[spot.row], drawing = drawingOf(row, frame), column = spot.column;
  if (!drawing) { byId("spot").textContent = `${row.name}: no partition here${prunes ? " yet" : ""}.`; return; }
  const channel = drawing.order[column], score = drawing.scores[column];
  let rank = 1;
  for (const other of drawing.scores) rank += other > score;
  const region = column < row.retained ? "retained" : column < row.resident ? "candidate" : "pruned";
  const picked = row.picked.get(frame), wanted = row.wanted.get(frame);
  const now = region !== "candidate" ? "" : picked ? (bit(picked, column - row.retained) ? ", picked for this token" : ", not picked for this token") : "";
  const often = region === "candidate" && row.picked.size ? `; picked at ${row.times[channel]} of ${row.picked.size} steps` : "";
  const dense = wanted ? `; dense ${bit(wanted, column) ? "wants" : "does not want"} it for this token` : "";
  byId("spot").textContent = `${pinned ? "Pinned: " : ""}${row.name}, channel ${channel}: score ${score.toPrecision(3)}, rank ${rank} of ${row.channels}; ${region}${now}${often}${dense}.`;
}

function show(index) {
  frameOf.before = index === frame + 1 ? frame : undefined;
  frame = Math.max(0, Math.min(last, index));
  frameOf.fade = frameOf.playing && frameOf.before !== undefined ? 0 : 1;
  const one = frames[frame], tokens = byId("answer").children;
  for (let at = 0; at <= last; at++) {
    const blank = at === frame && one.text.trim() === "" ? " blank" : "", parts = tokens[at].dataset.parts === "" ? " parts" : "";
    const kind = (frames[at].agrees ? "" : "off ") + (at === frame ? "now" : at > frame ? "later" : "") + blank + parts;
    if (tokens[at].className !== kind) tokens[at].className = kind;
  }
  showStrip();
  byId("slider").value = frame;
  byId("slider").setAttribute("aria-valuetext", `token ${frame + 1} of ${frames.length}: ${one.text}`);
  byId("position").textContent = `${frame + 1} / ${frames.length}`;
  byId("said").textContent = said(one);
  byId("probability").textContent = percent(one.probability);
  byId("dense-probability").textContent = percent(one.dense_probability);
  byId("dense-said").textContent = visible(one.dense_likeliest);
  byId("dense-likeliest-probability").textContent = percent(one.dense_likeliest_probability);
  byId("agrees").textContent = one.agrees ? "the same token" : "another token";
  byId("bytes").textContent = frame ? megabytes(one.bytes) : "–";
  byId("ms").textContent = frame ? one.ms.toFixed(1) + " ms" : "–";
  byId("bytes-bar").style.width = frame ? percent(one.bytes / one.dense_bytes).replace(" ", "") : "0";
  byId("ms-bar").style.width = frame ? 100 * one.ms / Math.max(one.ms, one.dense_ms) + "%" : "0";
  byId("bytes-words").textContent = frame ? `${percent(one.bytes / one.dense_bytes)} of dense's ${megabytes(one.dense_bytes)}` + (one.dense_step ? "; this step ran dense" + (one.redrawn ? " and drew the partition anew" : " to gather evidence") : "") : "the prompt gave this token; steps begin with the next";
  byId("ms-words").textContent = frame ? `${percent(one.ms / one.dense_ms)} of dense's ${one.dense_ms.toFixed(1)} ms` : `the prompt took ${run.statistics.timing.prefill_ms.toFixed(0)} ms, and ${run.statistics.timing.partition_ms.toFixed(0)} ms for the partition`;
  drawAll();
}

function showStrip() {
  // A line of the text around the token, beside the map that belongs to it.
  const text = list => list.map(one => one.text).join("").replace(/\n/g, "⏎"), strip = byId("strip"), now = document.createElement("span");
  const room = Math.floor(strip.parentElement.clientWidth / 20);
  now.className = "now";
  now.textContent = said(frames[frame]);
  strip.replaceChildren(`token ${frame + 1}: …${text(frames.slice(Math.max(0, frame - 40), frame)).slice(-room)}`, now, text(frames.slice(frame + 1, frame + 40)).slice(0, room));
}

function tell(at) {
  // The numbers of a token that is pointed at.
  const one = frames[at];
  byId("hovered").textContent = `Token ${at + 1} “${said(one)}”: ${percent(one.probability)} to the pruned model, ${percent(one.dense_probability)} to dense`
    + (one.agrees ? "." : `, which would have said “${visible(one.dense_likeliest)}” (${percent(one.dense_likeliest_probability)}).`);
}

function drawAll() {
  drawMap();
  showLayer();
  drawChances();
  drawTimes();
  drawExperts();
  if (!frameOf.playing) { fillTable(); describeSpot(); }
}

function showLayer() {
  const row = rows[selected], wanted = row.wanted.get(frame), picked = row.picked.get(frame);
  byId("layer-name").textContent = `${row.name} (of ${run.layers_in_all} layers)`;
  drawCurve();
  drawHistory();
  let words = `${row.retained} channels retained, ${row.candidate} candidates of which a step picks ${row.picks}, ${row.channels - row.resident} pruned.`;
  if (wanted) {
    const counts = [0, 0, 0, 0];
    for (let column = 0; column < row.channels; column++) {
      if (bit(wanted, column)) counts[column < row.retained ? 0 : column >= row.resident ? 3 : picked && bit(picked, column - row.retained) ? 1 : 2]++;
    }
    words += ` Of the ${row.active} that dense wants for this token, ${counts[0]} are retained, ${counts[1]} picked, ${counts[2]} candidates that lost, and ${counts[3]} pruned; weighed by squared score, the step left out ${percent(row.left_out[frame][0])} (at best ${percent(row.left_out[frame][1])}).`;
  }
  byId("split").textContent = words;
}

function choose(row) {
  selected = Math.max(0, Math.min(rows.length - 1, row));
  if (spot) spot = {row: selected, column: Math.min(spot.column, rows[selected].channels - 1)};
  byId("column").max = rows[selected].channels - 1;
  drawMap();
  showLayer();
  describeSpot();
}

// ---- playing ----

function stop() {
  if (!frameOf.playing) return;
  frameOf.playing = false;
  byId("play").textContent = "▶";
  byId("play").setAttribute("aria-label", "Play");
  show(frame);
}

function play() {
  if (frameOf.playing) { stop(); return; }
  if (frame === last) show(0);
  frameOf.playing = true;
  byId("play").textContent = "❚❚";
  byId("play").setAttribute("aria-label", "Pause");
  began = performance.now();
  requestAnimationFrame(tick);
}

function tick(now) {
  if (!frameOf.playing) return;
  const length = 1000 / Number(byId("speed").value), passed = now - began;
  if (passed >= length) {
    if (frame === last) { stop(); return; }
    began = passed > 2 * length ? now : began + length;
    show(frame + 1);
  } else if (frameOf.before !== undefined) {
    frameOf.fade = matchMedia("(prefers-reduced-motion: reduce)").matches ? 1 : Math.min(1, 1.4 * passed / length);
    drawMap();
  }
  requestAnimationFrame(tick);
}

function onKey(event) {
  const at = event.target;
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === " " && !["BUTTON", "SUMMARY", "SELECT"].includes(at.tagName)) { event.preventDefault(); play(); return; }
  const keys = {
    ArrowRight: () => show(frame + 1), ArrowLeft: () => show(frame - 1), Home: () => show(0), End: () => show(last),
    ArrowUp: () => choose(selected - 1), ArrowDown: () => choose(selected + 1),
    Escape: () => { pinned = false; spot = null; drawMap(); byId("spot").textContent = ""; },
  };
  const act = !at.matches("select, #column, .scroll") && keys[event.key];
  if (!act) return;
  event.preventDefault();
  if (event.key !== "ArrowUp" && event.key !== "ArrowDown") stop();
  act();
}

function spotAt(event) {
  // The row and column of the map under a pointer, or null.
  const box = byId("map").getBoundingClientRect(), {left, top, high, columns, scale} = layout;
  const row = Math.floor((event.clientY - box.top - top) / high), share = (event.clientX - box.left - left) / (columns / scale);
  if (row < 0 || row >= rows.length || share < 0 || share >= 1) return null;
  return {row, column: Math.floor(share * rows[row].channels)};
}

function hover(event) {
  // A mouse shows the channel below it, unless one is pinned. A finger does so while it moves.
  const found = spotAt(event);
  if (!found || (pinned && event.pointerType === "mouse")) return;
  spot = found;
  if (!frameOf.playing) drawMap();
  describeSpot();
}

function pin(event) {
  // A click or a tap pins a channel; on the channel that is pinned it frees it.
  const found = spotAt(event);
  if (!found) return;
  const near = pinned && spot && spot.row === found.row && Math.abs(spot.column - found.column) / rows[found.row].channels < 0.01;
  pinned = !near;
  spot = found;
  choose(found.row);
  byId("column").value = spot.column;
}

function scrub(event) {
  // Go to the token under the pointer, in a chart over the tokens.
  if (event.type === "pointermove" && !event.buttons) return;
  const box = event.currentTarget.getBoundingClientRect(), share = (event.clientX - box.left - 44) / (box.width - 54);
  stop();
  show(Math.round(share * last));
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").textContent = dark ? "Light" : "Dark";
  readColours();
}

function redraw() {
  layOut();
  drawAll();
  drawHeads();
}

function listen() {
  byId("theme").addEventListener("click", () => { setTheme(document.documentElement.dataset.theme !== "dark"); redraw(); });
  byId("play").addEventListener("click", play);
  byId("slider").addEventListener("input", () => { stop(); show(Number(byId("slider").value)); });
  byId("column").addEventListener("input", () => { spot = {row: selected, column: Number(byId("column").value)}; pinned = true; drawMap(); describeSpot(); });
  byId("map").addEventListener("pointermove", hover);
  byId("map").addEventListener("click", pin);
  for (const name of ["history", "chances", "times"]) {
    for (const kind of ["pointerdown", "pointermove"]) byId(name).addEventListener(kind, scrub);
  }
  const tokenAt = event => event.target.dataset.at === undefined ? null : Number(event.target.dataset.at);
  byId("answer").addEventListener("pointerover", event => { if (tokenAt(event) !== null) tell(tokenAt(event)); });
  byId("answer").addEventListener("click", event => { if (tokenAt(event) !== null) { stop(); show(tokenAt(event)); tell(tokenAt(event)); } });
  document.addEventListener("keydown", onKey);
  let resized = 0;
  window.addEventListener("resize", () => { cancelAnimationFrame(resized); resized = requestAnimationFrame(redraw); });
}

async function begin() {
  await readRun();
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
  frameOf.mostMissed = Math.max(0, ...rows.flatMap(row => [...row.missed.values()]));
  byId("slider").max = last;
  byId("column").max = rows[0].channels - 1;
  byId("experts-box").hidden = !isMixture;
  byId("heads-box").hidden = !run.heads.length;
  fillText();
  fillWords();
  layOut();
  const wished = /^#(\d+)(?:,(\d+))?$/.exec(location.hash);                         // page.html#token,layer
  selected = Math.min(rows.length - 1, wished && wished[2] ? Number(wished[2]) : Math.max(0, rows.findIndex((row, index) => index >= Math.floor(rows.length / 2) && row.picked.size)));
  show(wished ? Number(wished[1]) - 1 : Math.min(1, last));
  drawHeads();
  showPictures();
  listen();
}

// Tests wait for this promise.
const ready = begin().catch(error => {
  byId("verdict").textContent = `This page cannot be drawn here: ${error.message}. It needs a browser of 2023 or later.`;
  throw error;
});
