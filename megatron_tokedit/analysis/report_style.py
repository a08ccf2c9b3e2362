"""How a report looks: one style sheet, no font or picture from elsewhere."""

STYLE = """\
:root { --ink: #2e3440; --soft: #667085; --line: #e3e7ee; --paper: #ffffff; --ground: #f5f6f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 40px 36px 80px; background: var(--paper);
  min-height: 100vh; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 12px; }
h2 { font-size: 22px; letter-spacing: -0.01em; margin: 52px 0 10px; padding-top: 18px;
  border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 0; }
p { margin: 10px 0; max-width: 76ch; }
.lead { font-size: 18px; }
.note, figcaption, summary { color: var(--soft); font-size: 14px; }
.caution { background: #fff7e0; border-left: 4px solid #ebcb8b; padding: 8px 14px; font-size: 15px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 14px;
  margin: 26px 0; }
article { border: 1px solid var(--line); border-top: 5px solid; border-radius: 8px; padding: 14px 18px; }
article.good { border-top-color: #a3be8c; } article.watch { border-top-color: #ebcb8b; }
article.bad { border-top-color: #bf616a; }
article p, article ul { font-size: 14px; line-height: 1.45; }
article ul { padding-left: 18px; margin: 6px 0 0; } article li { margin-bottom: 6px; }
.verdict { font-weight: 650; font-size: 17px !important; margin: 2px 0 4px; }
.good .verdict { color: #557a3c; } .watch .verdict { color: #8a6a10; } .bad .verdict { color: #a03a45; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }
.wide, .scroll { overflow-x: auto; }
.scroll { max-height: 560px; overflow-y: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; font-size: 14px; margin: 12px 0; font-variant-numeric: tabular-nums; }
.scroll .wide { overflow: visible; } .scroll table { margin: 0; width: 100%; }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; background: var(--paper); position: sticky;
  top: 0; z-index: 1; vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 500; }
.bigrams td { text-align: left; position: relative; min-width: 150px; }
.bigrams thead th { text-align: left; }
.bigrams small { color: var(--soft); float: right; margin-left: 14px; }
.bar { position: absolute; left: 0; bottom: 0; height: 3px; opacity: 0.75; }
code { font: 13px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
figure { margin: 18px 0; } img { max-width: 100%; height: auto; display: block; }
summary { cursor: pointer; margin: 10px 0; }
@media (max-width: 640px) { main { padding: 24px 18px 60px; } }
@media print { body { background: none; } .scroll { max-height: none; } h2 { break-after: avoid; } }
"""
