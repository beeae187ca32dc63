// A run as it is now, asked for while somebody looks: every two seconds, or as the server says.
{
  const name = new URLSearchParams(location.search).get("run") ?? document.querySelector("h1").textContent;
  let next = 2;
  const SAID = { working: "working", finished: "finished", killed: "not running: its process is gone without a word", failed: "failed", interrupted: "interrupted", silent: "no sign of life", stopped: "not running; some stages are left" };
  const span = (s) => {
    if (s == null || !isFinite(s)) return "";
    if (s < 100) return `${Math.round(s)} s`;
    if (s < 6000) return `${Math.round(s / 60)} min`;
    return s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${(s / 86400).toFixed(1)} days`;
  };
  const ago = (t) => span(Math.max(Date.now() / 1000 - t, 0));

  const head = (found) => {
    const { progress, state } = found;
    const told = [make("div", { class: `state ${state}`, id: "live-state" }, SAID[state] ?? state)];
    const box = byId("live-facts");
    box.replaceChildren();
    if (!progress) return tell(byId("live-told"), ...told);
    const at = progress.todo.indexOf(progress.stage);
    if (state !== "finished" && progress.stage) {
      told.push(make("p", {}, make("b", {}, progress.stage), ` (${at + 1} of ${progress.todo.length})`));
    }
    if (progress.error && state !== "working" && state !== "finished") told.push(make("p", { class: "warn" }, progress.error));
    tell(byId("live-told"), ...told);
    const bar = progress.bar;
    if (bar && state === "working") {
      const share = bar.total ? bar.done / bar.total : 0;
      box.append(make("div", { class: "meter big", role: "progressbar", "aria-label": bar.label, "aria-valuemin": 0, "aria-valuemax": bar.total, "aria-valuenow": bar.done }, make("i", { style: `width:${(share * 100).toFixed(1)}%` })));
      const facts = [`${bar.label}: ${count(bar.done)}${bar.total == null ? "" : ` of ${count(bar.total)}`}`];
      if (bar.tokens_per_s) facts.push(`${count(Math.round(bar.tokens_per_s))} tokens/s`);
      else if (bar.items_per_s) facts.push(`${bar.items_per_s.toFixed(1)} per second`);
      if (bar.seconds_left != null) facts.push(`about ${span(bar.seconds_left)} left of this step`);
      box.append(make("p", { class: "small muted", id: "live-bar" }, facts.join(" · ")));
    }
    const since = state === "working" ? `since ${new Date(progress.began * 1000).toLocaleString()}` : `last sign ${ago(progress.time)} ago`;
    box.append(make("p", { class: "small muted" }, `process ${progress.pid} on ${progress.host}, ${since}`));
    if (["killed", "interrupted", "failed", "stopped"].includes(state)) box.append(make("p", { class: "small" }, "The same command goes on where it was: ", make("code", {}, `selfsteer run ${found.folder}`)));
  };

  const SVG = "http://www.w3.org/2000/svg";
  const draw = (tag, attributes, text) => {
    const node = document.createElementNS(SVG, tag);
    for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
    if (text != null) node.textContent = text;
    return node;
  };
  // One chart per kind of metric; the contexts of an objective are its lines.
  const LINES = { "": ["base", ""], plain: ["plain", ""], good: ["good", ""], bad: ["bad", "dash"] };
  const curve = (stage, kind, series) => {
    const [w, h, left, bottom] = [340, 150, 46, 18];
    const all = series.flatMap(([, points]) => points);
    const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
    let [low, high] = [Math.min(...ys), Math.max(...ys)];
    if (low === high) { low -= 0.5; high += 0.5; }
    const [first, last] = [Math.min(...xs), Math.max(...xs, Math.min(...xs) + 1)];
    const x = (v) => left + ((v - first) / (last - first)) * (w - left - 8);
    const y = (v) => 8 + ((high - v) / (high - low)) * (h - bottom - 14);
    const facts = series.map(([name, points]) => `${name || "last"} ${points.at(-1)[1].toPrecision(3)}`).join(", ");
    const svg = draw("svg", { viewBox: `0 0 ${w} ${h}`, class: "curve", role: "img", "aria-label": `${stage}, ${kind}: ${facts}` });
    const short = (v) => (Math.abs(v) < 0.0005 ? "0" : v.toPrecision(2));
    for (const v of [low, high]) {
      svg.append(draw("line", { x1: left, x2: w - 8, y1: y(v), y2: y(v) }), draw("text", { x: left - 5, y: y(v) + 4, "text-anchor": "end" }, short(v)));
    }
    svg.append(draw("text", { x: left, y: h - 3 }, `step ${first}`), draw("text", { x: w - 8, y: h - 3, "text-anchor": "end" }, String(last)));
    const caption = make("figcaption", {}, `step ${count(Math.max(...xs))}: `);
    for (const [name, points] of series) {
      const [colour, dash] = LINES[name] ?? ["method-2", "dots"];
      svg.append(draw("path", { class: `${colour} ${dash}`, d: points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("") }));
      if (points.length === 1) svg.append(draw("circle", { class: colour, cx: x(points[0][0]), cy: y(points[0][1]), r: 3, fill: "currentColor" }));
      caption.append(make("span", { class: colour }, `${name ? `${name} ${dash === "dash" ? "(dashed) " : ""}` : series.length > 1 ? "all " : ""}${points.at(-1)[1].toPrecision(3)}  `));
    }
    return make("figure", { "data-curve": `${stage} ${kind}`, "data-points": series[0][1].length }, make("h3", {}, kind), svg, caption);
  };
  const KINDS = ["loss", "rewards/margins", "rewards/accuracies"];
  let drawn = "";
  const curves = (found) => {
    const text = JSON.stringify(found.curves);
    if (text === drawn) return;
    drawn = text;
    const stages = Object.entries(found.curves).reverse(); // the newest first
    byId("live-curves").replaceChildren(...stages.flatMap(([stage, metrics]) => [make("h3", { class: "above" }, stage),
      make("div", { class: "figures curves" }, ...KINDS.map((kind) => {
        const series = Object.entries(metrics).filter(([m]) => m === kind || m.startsWith(`${kind}/`)).map(([m, points]) => [m.slice(kind.length + 1), points]);
        return series.length ? curve(stage, kind, series) : null;
      }).filter(Boolean))]));
    if (!stages.length) byId("live-curves").append(make("p", { class: "muted" }, "No training has logged a step yet."));
  };

  const samples = (found) => {
    const s = found.samples;
    const box = byId("live-samples");
    if (!s) return box.replaceChildren(make("p", { class: "muted" }, "Nothing is sampled yet."));
    box.replaceChildren(make("p", { class: "muted small" }, `${s.set}, ${ago(s.time)} ago`), ...s.triples.map((t) => make("article", { style: "margin-bottom:1rem" },
      make("p", {}, make("a", { href: `/data?run=${encodeURIComponent(name)}#/triple/${encodeURIComponent(t.id)}?set=${encodeURIComponent(s.set)}` }, t.query)),
      make("div", { class: "columns" }, ...Object.entries(t.responses).map(([r, text]) =>
        make("div", { class: `card ${r}` }, make("h3", {}, r), make("div", { class: "response" }, text)))))));
  };

  const stages = (found) => {
    byId("live-stages").replaceChildren(table(["stage", { text: "in", class: "num" }, { text: "out", class: "num" }, "dropped", { text: "time", class: "num" }],
      found.stages.map((s) => {
        const mine = found.progress?.stage === s.name && found.state === "working";
        const lost = Object.entries(s.dropped ?? {}).map(([reason, n]) => `${count(n)} ${words(reason)}`).join(", ");
        const state = s.state === "done" ? lost : mine ? "working" : s.state === "begun" ? "begun, not finished" : "to do";
        return make("tr", { class: s.state === "to do" ? "muted" : null }, make("th", { scope: "row" }, s.name), make("td", { class: "num" }, s.n_in == null ? "" : count(s.n_in)),
          make("td", { class: "num" }, s.n_out == null ? "" : count(s.n_out)), make("td", {}, state), make("td", { class: "num" }, span(s.seconds)));
      })));
  };

  const look = async () => {
    if (!document.hidden) {
      try {
        const found = await ask("/api/live", { run: name });
        next = found.next;
        byId("live-gone").hidden = true;
        byId("live-about").textContent = found.about;
        byId("live-result").textContent = found.result;
        head(found);
        curves(found);
        samples(found);
        stages(found);
      } catch (e) {
        byId("live-gone").hidden = false;
        tell(byId("live-gone"), e instanceof TypeError ? "The server does not answer; what is below is from before." : e.message);
      }
    }
    setTimeout(look, 1000 * next);
  };
  look();
}
