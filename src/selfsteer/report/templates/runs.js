// All runs of a folder, asked for every five seconds while somebody looks.
{
  const SHOWN = 5; // settings of a run; the others open
  const interval = (v) => (v ? `${v[0].toFixed(3)}${v[1] == null ? "" : ` [${v[1].toFixed(3)}, ${v[2].toFixed(3)}]`}` : "");
  const value = (v) => (v == null ? "null" : typeof v === "object" ? JSON.stringify(v) : String(v));
  const open = new Set(); // runs whose settings somebody has opened
  const settings = (name, differs) => {
    const lines = Object.entries(differs).map(([k, v]) => make("div", {}, `${k}=${value(v)}`));
    if (lines.length <= SHOWN) return lines;
    const more = make("details", { open: open.has(name), ontoggle: (e) => (e.target.open ? open.add(name) : open.delete(name)) },
      make("summary", {}, `${lines.length - SHOWN} more`), ...lines.slice(SHOWN));
    return [...lines.slice(0, SHOWN), more];
  };
  const look = async () => {
    if (!document.hidden) {
      try {
        const { runs } = await ask("/api/runs");
        byId("live-gone").hidden = true;
        byId("runs").replaceChildren(runs.length ? table(
          ["run", "state", "method", "score", "win rate", { text: "accuracy", class: "num" }, { text: "on-policy", class: "num" }, { text: "tokens", class: "num" }, runs.length > 1 ? "set differently" : ""],
          runs.map((r) => make("tr", {},
            make("th", { scope: "row" }, make("a", { href: `/live?run=${encodeURIComponent(r.run)}` }, r.run)),
            make("td", {}, make("span", { class: `state ${r.state}` }, r.state), r.of && r.done < r.of ? ` ${r.done} of ${r.of}` : "", r.error ? make("div", { class: "small muted" }, r.error) : null),
            make("td", {}, r.method ?? ""),
            make("td", {}, interval(r.score)), make("td", {}, interval(r.win_rate)),
            make("td", { class: "num" }, number(r.accuracy, 3)), make("td", { class: "num" }, number(r.on_policyness, 3)), make("td", { class: "num" }, number(r.tokens, 1)),
            make("td", { class: "mono small" }, ...settings(r.run, r.differs)))))
          : make("p", { class: "muted" }, "No run here yet."));
      } catch (e) {
        byId("live-gone").hidden = false;
        tell(byId("live-gone"), e instanceof TypeError ? "The server does not answer; what is below is from before." : e.message);
      }
    }
    setTimeout(look, 5000);
  };
  look();
}
