// The data browser: list, filter, one triple. Rows come from the server, or from the page itself.
{
  const start = JSON.parse(byId("browser-start").textContent);
  const PAGE = start.rows ? 20 : 50; // in a report it is one section of many
  const STRONGEST = 6; // nats at which a token has the full colour
  const ODD = 4; // nats beyond which it is underlined
  const HEAD = 56; // pixels below the page's head, which stays on top
  const MOST = 5; // words that the principles like best, and least
  const form = byId("browser-filter");
  const list = byId("browser-list");
  const detail = byId("browser-triple");
  const help = byId("browser-help");
  const blank = { set: "", q: "", fate: "", verdict: "", feature: "", sort: "" };
  let state = { ...blank, page: 0, id: null };
  let shown = { rows: [], total: 0 };
  let cursor = 0;
  let turn = 0; // of the newest request; older answers are not shown
  let again = 0;
  let wished = ""; // what the reader wants tokens coloured by

  // -- where rows come from -----------------------------------------------------------------------

  const dropped = (fate) => fate !== "kept" && fate !== "pending";

  const local = {
    wanted(s) {
      const q = s.q.toLowerCase();
      const rows = start.rows.filter((r) => r.set === s.set &&
        (!s.fate || (s.fate === "dropped" ? dropped(r.fate) : r.fate === s.fate)) &&
        (!s.verdict || r.verdict === s.verdict) &&
        (!s.feature || r.features.includes(s.feature)) &&
        (!q || texts(r).some((t) => t.toLowerCase().includes(q))));
      const [field, ascending] = s.sort.split(" ");
      if (field) {
        const sign = ascending ? 1 : -1;
        rows.sort((a, b) => (a[field] == null) - (b[field] == null) || sign * (a[field] - b[field]) || a.n - b.n);
      }
      return rows;
    },
    async page(s) {
      const rows = this.wanted(s);
      return { ...start.about[s.set], total: rows.length, rows: rows.slice(s.page * PAGE, (s.page + 1) * PAGE) };
    },
    async triple(s) {
      const found = start.rows.find((r) => r.set === s.set && r.id === s.id);
      if (!found) throw new Error(`${s.id} is not among the triples that this page holds; selfsteer view shows all.`);
      return found;
    },
    save(s) {
      const lines = this.wanted(s).map((r) => JSON.stringify(
        { ...r.triple, ...Object.fromEntries(start.exported.filter((k) => r[k] != null).map((k) => [k, r[k]])) }));
      const link = make("a", { href: URL.createObjectURL(new Blob([lines.map((l) => l + "\n").join("")])), download: `${start.run}-${s.set.replaceAll("/", "-")}.jsonl` });
      link.click();
      URL.revokeObjectURL(link.href);
    },
  };
  const texts = (r) => [r.id, ...r.triple.messages.map((m) => m.content), ...Object.values(r.triple.responses ?? {}), ...(r.triple.answers ?? []),
    r.triple.principles?.good ?? "", r.triple.principles?.bad ?? ""];

  const query = (s) => {
    const [sort, ascending] = s.sort.split(" ");
    return { run: start.run, set: s.set, q: s.q, fate: s.fate, verdict: s.verdict, feature: s.feature, sort, ascending };
  };
  const remote = {
    page: (s) => ask("/api/rows", { ...query(s), offset: s.page * PAGE, limit: PAGE }),
    triple: (s) => ask("/api/triple", { run: start.run, set: s.set, id: s.id }),
    save(s) {
      const url = new URL("/api/export", location.origin);
      for (const [name, value] of Object.entries(query(s))) if (value) url.searchParams.set(name, value);
      make("a", { href: url, download: "" }).click();
    },
  };
  const source = start.rows ? local : remote;

  // -- the address is the state: #/triple/ID?set=…&q=… ---------------------------------------------

  const parse = () => {
    const own = location.hash.startsWith("#/") ? location.hash.slice(1) : "";
    const [path, rest = ""] = own.split("?");
    const given = new URLSearchParams(rest);
    const next = { ...blank, page: 0, id: null };
    for (const name of Object.keys(blank)) next[name] = given.get(name) ?? "";
    next.set ||= start.sets[0] ?? "";
    next.page = Math.max(parseInt(given.get("page") ?? "1", 10) - 1, 0) || 0;
    if (path.startsWith("/triple/")) next.id = decodeURIComponent(path.slice(8));
    return next;
  };
  const address = (s) => {
    const given = new URLSearchParams();
    for (const name of Object.keys(blank)) if (s[name] && !(name === "set" && s.set === start.sets[0])) given.set(name, s[name]);
    if (s.page) given.set("page", s.page + 1);
    const rest = given.toString();
    return `#/${s.id == null ? "" : `triple/${encodeURIComponent(s.id)}`}${rest ? `?${rest}` : ""}`;
  };
  const go = (change, replace = false) => {
    const to = address({ ...state, ...change });
    if (to === location.hash) return;
    if (replace) { history.replaceState(null, "", to); follow(); } else location.hash = to;
  };

  // -- the list -----------------------------------------------------------------------------------

  const options = (select, all, found, value) => {
    const names = value && !(value in found) && value !== "dropped" ? { ...found, [value]: 0 } : found;
    select.replaceChildren(make("option", { value: "" }, all),
      ...Object.entries(names).map(([name, n]) => make("option", { value: name }, n ? `${said(name)} (${count(n)})` : said(name))));
    select.value = value;
  };
  const SAID = { first: "good is better", second: "bad is better", tie: "tie", inconsistent: "depends on the order", unparseable: "unreadable", pending: "not decided yet" };
  const said = (name) => SAID[name] ?? words(name);
  const badge = (fate) => make("span", { class: `badge ${dropped(fate) ? "bad" : fate === "kept" ? "good" : "muted"}` }, said(fate));

  // columns of the list; those that no row of the set has a figure for are left out
  const FIGURES = [
    { name: "verdict", text: "judge", class: "wide-only", shown: said },
    { name: "gap", text: "gap", class: "num", title: "both steering gaps together, nats per token", shown: (v) => signed(v) },
    { name: "disagreement", text: "judge − principle", class: "num wide-only", title: "how far the judge contradicts the principles: the bad response's lead in score; without scores 1 where bad won, 0.5 where neither did", shown: (v) => signed(v) },
    { name: "length_difference", text: "longer by", class: "num wide-only", title: "characters that the good response (in ranked sets the chosen one) is longer than the bad one", shown: (v) => signed(v, 0) },
  ];

  const show = (found) => {
    shown = found;
    const fates = { ...found.fates };
    const lost = Object.entries(fates).filter(([f]) => dropped(f)).reduce((sum, [, n]) => sum + n, 0);
    if (lost) fates.dropped = lost;
    options(form.fate, "any", fates, state.fate);
    options(form.verdict, found.judge ? "any verdict" : "not judged", found.verdicts ?? {}, state.verdict);
    options(form.feature, "any", found.features ?? {}, state.feature);
    for (const option of form.sort.options) option.hidden = option.disabled = Boolean(option.value) && !option.selected && !found.filled?.includes(option.value.split(" ")[0]);
    const pages = Math.max(Math.ceil(found.total / PAGE), 1);
    byId("browser-page").textContent = pages > 1 ? `${count(state.page + 1)} of ${count(pages)}` : "";
    byId("browser-before").hidden = byId("browser-after").hidden = pages === 1;
    byId("browser-before").disabled = state.page === 0;
    byId("browser-after").disabled = state.page >= pages - 1;
    byId("browser-export").disabled = !found.total;
    tell(byId("browser-status"), status(found));
    cursor = Math.min(cursor, Math.max(found.rows.length - 1, 0));
    const figures = FIGURES.filter((f) => found.filled?.includes(f.name));
    const rows = found.rows.map((r, i) => make("tr", { "aria-selected": String(i === cursor), onclick: () => go({ id: r.id }) },
      make("td", {}, make("a", { href: address({ ...state, id: r.id }) }, r.query)),
      make("td", {}, badge(r.fate)),
      ...figures.map((f) => make("td", { class: f.class }, r[f.name] == null ? "" : f.shown(r[f.name])))));
    list.replaceChildren(found.rows.length ? table(["query", "went on", ...figures], rows)
      : make("p", { class: "muted" }, found.of ? "Nothing here is like that." : found.building ? "The triples are being indexed, once for each state of the stage." : "There are no triples yet."));
  };

  const status = (found) => {
    const parts = found.of ? [`${count(found.total)} of ${count(found.of)} triples`] : [];
    if (found.cap) parts.push(found.cap);
    if (found.unreadable) parts.push(`${count(found.unreadable)} unreadable lines are left out`);
    if (found.building) parts.push(found.building.total ? `indexing ${count(found.building.done)} of ${count(found.building.total)}` : "indexing");
    return parts.join(" · ");
  };

  const select = (step) => {
    const next = cursor + step;
    if (next >= 0 && next < shown.rows.length) {
      cursor = next;
      list.querySelectorAll("tbody tr").forEach((row, i) => {
        row.setAttribute("aria-selected", String(i === cursor));
        if (i === cursor) row.scrollIntoView({ block: "nearest" });
      });
      if (state.id != null) go({ id: shown.rows[cursor].id });
    } else if (step > 0 ? (state.page + 1) * PAGE < shown.total : state.page > 0) {
      turnPage(step, state.id != null);
    }
  };
  const turnPage = async (step, open) => {
    cursor = step > 0 ? 0 : PAGE - 1;
    if (!open) return go({ page: state.page + step });
    const found = await source.page({ ...state, page: state.page + step });
    if (found.rows?.length) go({ page: state.page + step, id: found.rows[Math.min(cursor, found.rows.length - 1)].id });
  };

  // -- one triple -----------------------------------------------------------------------------------

  // what colours tokens: their log-prob under the plain context, or the contrast of the principles
  const MEANING = { logps: "log-prob under the plain context", contrast: "contrast of the principles" };
  const textOf = (record, name) => record.trained_on[name] ?? record.triple.responses?.[name] ?? record.triple.answers?.[name.split(" ")[1] - 1];
  // whether the run took the plain answer in place of one under a principle
  const isPlain = (record, name) => {
    const made = record.trained_on[name], { plain, [name]: own } = record.triple.responses ?? {};
    return name !== "plain" && made != null && !own?.includes(made) && !!plain?.includes(made);
  };
  const known = (record) => Object.keys(MEANING).filter((kind) => Object.values(record.tokens).some((t) => t[kind]));
  const meaning = (record) => {
    const kinds = known(record);
    if (kinds.includes(wished)) return wished;
    const all = Object.values(record.tokens).every((t) => t.logps);
    return all ? kinds[0] : kinds.at(-1); // of ranked answers only those of the pair have log-probs
  };

  // tokens as pieces of text with their figures; bytes of one character are one piece
  const pieces = (text, { chars }, values) => {
    const letters = Array.from(text);
    const out = [];
    let at = 0, sum = 0;
    chars.forEach((length, i) => {
      sum += values[i];
      if (!length && i < chars.length - 1) return;
      out.push({ text: length ? letters.slice(at, at + length).join("") : "⏎", end: !length, value: sum });
      at += length;
      sum = 0;
    });
    if (at < letters.length) out.push({ text: letters.slice(at).join(""), value: null });
    return out;
  };
  const level = (value) => Math.sign(value) * start.levels.filter((bound) => Math.abs(value) >= bound).length;
  const LIKED = ["", "liked a little", "liked", "liked much"];
  const mark = (kind, { text, end, value }) => {
    const classes = ["token", end ? "end" : ""];
    let style, title;
    if (kind === "logps") {
      style = `--s:${Math.min(-value / STRONGEST, 1).toFixed(2)}`;
      if (value < -ODD) classes.push("odd");
      title = `${value.toFixed(2)} nats, p = ${Math.exp(value).toPrecision(2)}`;
    } else {
      const much = level(value);
      if (much) classes.push(much > 0 ? "liked" : "disliked", `much-${Math.abs(much)}`);
      title = `${signed(value)} nats${much ? `, ${much < 0 ? "dis" : ""}${LIKED[Math.abs(much)]}` : ""}`;
    }
    return make("span", { class: classes.filter(Boolean).join(" "), style, title: (end ? "end of turn, " : "") + title }, text);
  };
  const response = (record, name) => {
    const text = textOf(record, name), tokens = record.tokens[name], kind = meaning(record);
    if (!tokens?.[kind]) return make("div", { class: "response" }, text);
    return make("div", { class: "response" }, ...pieces(text, tokens, tokens[kind]).map((p) => (p.value == null ? p.text : mark(kind, p))));
  };
  // what the colours of a contrast show, in words
  const extremes = (record, name) => {
    const tokens = record.tokens[name];
    if (!tokens?.contrast || meaning(record) !== "contrast") return null;
    const ranked = pieces(textOf(record, name), tokens, tokens.contrast).filter((p) => p.text.trim() && level(p.value ?? 0)).sort((a, b) => b.value - a.value);
    const said = (all) => all.slice(0, MOST).map((p) => `${p.text.trim()} ${signed(p.value)}`).join(", ");
    const liked = said(ranked.filter((p) => p.value > 0)), not = said(ranked.filter((p) => p.value < 0).reverse());
    return make("p", { class: "extremes" }, liked ? make("span", {}, make("b", { class: "good" }, "likelier: "), liked) : null, liked && not ? make("br") : null, not ? make("span", {}, make("b", { class: "bad" }, "less likely: "), not) : null);
  };

  const column = (record, { name, role, score, principle }) => {
    const text = textOf(record, name);
    const side = { chosen: "good", rejected: "bad" }[role] ?? name;
    const card = make("article", { class: `card ${side}` }, make("h3", {}, role ? `${name}, ${role}` : name), principle == null ? null : make("div", { class: "principle" }, principle));
    if (text == null) {
      card.append(make("p", { class: "muted" }, name === "plain" ? "This stage samples no plain response." : "No such response."));
      return card;
    }
    card.append(response(record, name), extremes(record, name) ?? "");
    const tokens = record.tokens[name];
    const facts = [`${count(Array.from(text).length)} characters`];
    const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
    if (tokens) facts.push(`${count(tokens.chars.length)} tokens`);
    if (tokens?.logps) facts.push(`mean log-prob ${mean(tokens.logps).toFixed(2)}`);
    if (tokens?.contrast) facts.push(`mean contrast ${signed(mean(tokens.contrast), 3)}`);
    if (score != null) facts.push(`score ${number(score, 3)}`);
    const other = isPlain(record, name);
    if (record.triple.finish_reasons?.[other ? "plain" : name] === "length") facts.push("cut off by the budget");
    if (other) facts.push("the run took the plain answer here");
    else if (record.trained_on[name] != null && record.triple.responses?.[name] != null) facts.push("a lead-in was cut off the front");
    card.append(make("div", { class: "figures-line" }, facts.join(" · ")));
    return card;
  };
  // the answers of a record, each with its principle, and the principles of answers that have none
  const columns = (record) => {
    const { triple } = record;
    if (record.answers) return record.answers;
    return ["plain", "good", "bad"].filter((n) => !alone(record) || n === "plain").map((name) => ({
      name, principle: name === "plain" || isPlain(record, name) ? "No principle." : triple.principles?.[name] ?? "The principle is not stored here." }));
  };
  const alone = (record) => !record.answers && Object.keys({ ...record.triple.responses, ...record.trained_on }).join() === "plain";
  const principles = (record) => {
    const both = record.triple.principles;
    if (!both || !(record.answers || alone(record))) return null;
    return make("div", { class: "principle" }, ...["good", "bad"].map((side) => make("p", {}, make("b", { class: side }, `${side} principle: `), both[side])));
  };

  const judgement = (record) => {
    const j = record.judgement;
    if (record.answers || alone(record)) return "";
    if (!j) return make("p", { class: "muted small" }, start.rows || shown.judge ? "The judge was not asked about this pair." : "The run has no judge.");
    const box = make("div", { class: "card" }, make("h3", {}, `${j.judge}: ${said(j.verdict)}`));
    if (j.scores) box.append(make("p", { class: "small" }, `score of good ${number(j.scores[0], 3)}, of bad ${number(j.scores[1], 3)}`));
    for (const order of j.orders ?? []) {
      box.append(make("p", { class: "small" }, `shown with ${order.first} first: `, make("b", {}, said(order.said))),
        make("details", {}, make("summary", {}, "its words"), make("div", { class: "response small" }, order.text)));
    }
    if (j.reason) box.append(make("p", { class: "small muted" }, words(j.reason)));
    return box;
  };

  const showTriple = (record) => {
    const at = shown.rows.findIndex((r) => r.id === record.id);
    if (at >= 0) cursor = at;
    const kinds = known(record), kind = meaning(record);
    const legend = kinds.length
      ? make("span", { class: "legend" },
        kinds.length < 2 ? `${MEANING[kind]}:` : make("select", { "aria-label": "Tokens are coloured by", onchange: (e) => { wished = e.target.value; showTriple(record); detail.querySelector(".legend select").focus(); } },
          ...kinds.map((k) => make("option", { value: k, selected: k === kind }, MEANING[k]))),
        ...(kind === "logps" ? [0, -1, -3, -6] : [-1, -0.3, -0.1, 0, 0.1, 0.3, 1]).map((v) => mark(kind, { text: (kind === "logps" ? String(v) : signed(v, 1)).replace("-", "−"), value: v })),
        kind === "contrast" ? `nats by which the good principle makes a token likelier than the bad one${shown.clip == null ? "" : `, kept to ±${shown.clip}`}` : null,
        make("button", { type: "button", class: "quiet", onclick: colour }, "on / off"))
      : make("span", { class: "legend" }, `No colour: ${shown.why_no_colour || "the run has not scored these responses"}.`);
    const gap = record.gaps;
    const fact = (name, value) => make("span", {}, `${name} `, make("b", {}, value));
    detail.replaceChildren(
      make("div", { class: "bar" },
        make("button", { type: "button", onclick: () => go({ id: null }) }, "← list"),
        make("button", { type: "button", onclick: () => select(-1), "aria-label": "Previous triple" }, "k ↑"),
        make("button", { type: "button", onclick: () => select(1), "aria-label": "Next triple" }, "j ↓"),
        make("span", { class: "muted small mono" }, record.id)),
      make("div", {}, ...record.triple.messages.map((m) => make("div", { class: "turn" }, make("b", {}, m.role), m.content))),
      make("div", { class: "facts" }, badge(record.fate),
        dropped(record.fate) ? fact("dropped by", words(shown.decided_by ?? "")) : null,
        record.features.length ? fact("features", record.features.join(", ")) : null,
        gap?.good != null ? fact("steering gap, good", signed(gap.good)) : null,
        gap?.bad != null ? fact("bad", signed(gap.bad)) : null,
        record.length_difference != null ? fact(`${record.answers ? "chosen − rejected" : "good − bad"}, characters`, signed(record.length_difference, 0)) : null),
      principles(record) ?? "",
      make("p", {}, legend),
      make("div", { class: "columns" }, ...columns(record).map((c) => column(record, c))),
      make("div", { style: "margin-top:0.75rem" }, judgement(record)));
  };
  const colour = () => byId("browser").classList.toggle("uncoloured");

  // -- following the address --------------------------------------------------------------------------

  const fail = (e) => { tell(byId("browser-status"), e.message); };

  const follow = async () => {
    clearTimeout(again);
    const before = state;
    state = parse();
    const mine = ++turn;
    form.set.value = state.set;
    form.sort.value = state.sort;
    if (document.activeElement !== form.q) form.q.value = state.q;
    if (address({ ...before, id: null }) !== address({ ...state, id: null }) && before.page === state.page) cursor = 0;
    const same = shown.rows.length && address({ ...before, id: null }) === address({ ...state, id: null });
    try {
      if (!same || state.id == null) {
        const found = await source.page(state);
        if (mine !== turn) return;
        show(found);
        if (found.building) again = setTimeout(follow, 1000);
        else if (found.working) again = setTimeout(follow, 10000);
      }
      if (state.id != null) {
        const record = await source.triple(state);
        if (mine !== turn) return;
        if (record.building) again = setTimeout(follow, 1000);
        else showTriple(record);
      }
    } catch (e) {
      if (mine !== turn) return;
      if (state.id != null) detail.replaceChildren(make("p", { class: "warn" }, e.message), make("button", { type: "button", onclick: () => go({ id: null }) }, "← list"));
      fail(e);
      if (source === remote) again = setTimeout(follow, 3000);
    }
    const opened = state.id != null;
    for (const node of [list, form, form.nextElementSibling]) node.hidden = opened;
    detail.hidden = !opened;
    const { top } = byId("browser").getBoundingClientRect();
    if (opened && before.id !== state.id && (top < HEAD || top > innerHeight / 2)) byId("browser").scrollIntoView({ block: "start" });
    else if (!opened && before.id != null) list.querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "center" });
  };

  // another part of the page says nothing about this one
  addEventListener("hashchange", () => { if (!location.hash || location.hash.startsWith("#/")) follow(); });
  form.set.replaceChildren(...start.sets.map((s) => make("option", { value: s }, s)));
  form.set.closest("label").hidden = start.sets.length < 2;
  form.addEventListener("submit", (e) => e.preventDefault());
  form.addEventListener("change", (e) => {
    if (e.target === form.q) return;
    const reset = e.target === form.set ? { fate: "", verdict: "", feature: "" } : {};
    go({ ...reset, [e.target.name]: e.target.value, page: 0, id: null });
  });
  let typing = 0;
  form.q.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => go({ q: form.q.value, page: 0, id: null }, true), 200);
  });
  byId("browser-before").addEventListener("click", () => go({ page: state.page - 1 }));
  byId("browser-after").addEventListener("click", () => go({ page: state.page + 1 }));
  byId("browser-export").addEventListener("click", () => source.save(state));
  byId("browser-keys").addEventListener("click", () => help.showModal());
  byId("browser-help-close").addEventListener("click", () => help.close());

  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || help.open) return;
    const field = /^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName);
    if (e.key === "Escape") {
      if (field) { list.scrollIntoView({ block: "nearest" }); e.target.blur(); } else if (state.id != null) go({ id: null });
      return;
    }
    if (field || !(detail.offsetParent || list.offsetParent)) return;
    const keys = {
      j: () => select(1),
      k: () => select(-1),
      c: colour,
      "/": () => { if (state.id != null) go({ id: null }); form.hidden = false; form.q.focus(); },
      "?": () => help.showModal(),
    };
    if (e.key === "Enter" && state.id == null && e.target === document.body && shown.rows[cursor]) go({ id: shown.rows[cursor].id });
    else if (keys[e.key]) { e.preventDefault(); keys[e.key](); }
  });
  follow();
}
