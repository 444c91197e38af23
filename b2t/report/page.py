"""The HTML of the report, a jinja2 template without scripts and without anything to fetch."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{ title }} – b2t report</title>
<style>
:root { --paper: #fcfcfd; --card: #ffffff; --ink: #1b1f24; --faint: #626b78; --line: #dfe3e9;
  --healthy: #1c7c4d; --concerning: #a36100; --critical: #c02a20; --unknown: #626b78; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --card: #1c2026; --ink: #e7eaee; --faint: #9aa3af; --line: #343b45;
    --healthy: #4cc38a; --concerning: #e8a33d; --critical: #ff6b5e; --unknown: #9aa3af; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 20px clamp(12px, 2.5vw, 32px) 60px; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; font-weight: 600; }
p { margin: .3rem 0; max-width: 80ch; }
.faint { color: var(--faint); }
.simulated { border: 1px solid var(--concerning); color: var(--concerning); border-radius: 6px;
  padding: .3rem .7rem; display: inline-block; margin: .6rem 0 0; font-weight: 600; }
.verdict { border-left: 6px solid var(--unknown); padding: .3rem 0 .3rem 1rem; margin: 1.2rem 0; }
.verdict b { font-size: 1.5rem; text-transform: capitalize; }
.verdict.healthy { border-color: var(--healthy); } .healthy b, td.healthy { color: var(--healthy); }
.verdict.concerning { border-color: var(--concerning); }
.concerning b, td.concerning { color: var(--concerning); }
.verdict.critical { border-color: var(--critical); }
.critical b, td.critical { color: var(--critical); }
td { overflow-wrap: anywhere; } td.number, td.grade, td.label { overflow-wrap: normal; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .42rem .75rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th { font-weight: 600; color: var(--faint); font-size: .86rem; }
td.number { white-space: nowrap; }
td.grade { font-weight: 600; white-space: nowrap; } td.faint { font-weight: 400; }
.verdict p:first-of-type { font-weight: 600; }
.plots { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
.one { max-width: 560px; margin: .8rem 0; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  padding: .8rem .8rem .4rem; color: var(--ink); min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
pre { overflow: auto; max-height: 28rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .8rem; font-size: .84rem; }
summary { cursor: pointer; font-weight: 600; padding: .4rem 0; }
ul { padding-left: 1.2rem; } li { margin: .35rem 0; max-width: 85ch; }
@media (max-width: 640px) {
  table.stack thead { display: none; }
  table.stack tr { display: block; border-bottom: 1px solid var(--line); padding: .5rem 0; }
  table.stack td { display: block; border: 0; padding: .1rem .75rem; }
  table.stack td:empty { display: none; }
  table.health tr { display: flex; flex-wrap: wrap; justify-content: space-between; }
  table.health td { flex: 1 1 100%; }
  table.health td.label { flex: 1 1 60%; font-weight: 600; }
  table.health td.grade { order: -1; flex: 0 0 auto; }
  table.health td.label { order: -2; }
  table.health td.number { flex: 0 1 auto; white-space: normal; }
  table.stack td[data-label]::before { content: attr(data-label) ": "; color: var(--faint);
    font-weight: 400; text-transform: none; }
}
</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
{% for s in summaries if s.simulated %}
{% if loop.first %}
<p class="simulated">SIMULATED DATA: recordings of b2t simulate, not of a brain</p>
{% endif %}
{% endfor %}
</header>

{% for s in summaries %}
<section>
{% if summaries|length > 1 %}<h2>{{ s.name }}</h2>{% endif %}
<div class="verdict {{ s.verdict }}">
<b>{{ s.verdict }}</b>
<p>{{ s.state }}</p>
{% for reason in s.reasons %}<p>{{ reason }}</p>{% endfor %}
{% for problem in s.problems %}<p class="faint">{{ problem }}</p>{% endfor %}
</div>
{% if summaries|length == 1 %}
<div class="wide"><table class="stack health">
<thead><tr><th>metric</th><th>value</th><th>healthy</th><th>concerning</th><th>grade</th>
<th>remedy</th></tr></thead>
<tbody>
{% for row in s.rows %}
<tr><td class="label">{{ row.label }}</td>
<td class="number" data-label="value">{{ row.value }}</td>
<td class="number faint" data-label="healthy">{{ row.range }}</td>
<td class="number faint" data-label="concerning">{{ row.concerning }}</td>
<td class="grade {{ row.grade if row.grade and row.decides else 'faint' }}">
{{ row.grade or 'not measured' }}</td>
<td class="{{ 'remedy' if row.grade in ('concerning', 'critical') else 'faint' }}">
{{- row.remedy if row.grade }}
{% if row.note and row.grade in ('concerning', 'critical') %}
<span class="faint">({{ row.note }})</span>{% endif %}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="faint">Beyond concerning lies critical.</p>
{% endif %}
</section>
{% endfor %}

{% if summaries|length > 1 %}
<h2>Side by side</h2>
<div class="wide"><table class="stack">
<thead><tr><th></th><th>healthy</th>
{% for s in summaries %}<th>{{ s.name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in summaries[0].rows %}
{% set number = loop.index0 %}
<tr><td class="label">{{ row.label }}</td>
<td class="number faint" data-label="healthy">{{ row.range }}</td>
{% for s in summaries %}
{% set own = s.rows[number] %}
<td class="number {{ own.grade if own.grade and own.decides else '' }}"
data-label="{{ s.name }}">{{ own.value }}</td>
{% endfor %}</tr>
{% endfor %}
{% for label, values in scores %}
<tr><td class="label">{{ label }}</td><td></td>
{% for value in values %}
<td class="number" data-label="{{ summaries[loop.index0].name }}">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}

{% if differences %}
<h2>Settings that differ</h2>
<div class="wide"><table class="stack">
<thead><tr><th>key</th>{% for s in summaries %}<th>{{ s.name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for key, values in differences %}
<tr><td class="label">{{ key }}</td>
{% for value in values %}
<td data-label="{{ summaries[loop.index0].name }}">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}

{% for s in summaries if s.scores and summaries|length == 1 %}
<h2>Decoding</h2>
<div class="wide"><table class="stack">
<thead><tr><th></th><th>model</th><th>95 % interval</th><th>on noise</th><th>shuffled</th></tr>
</thead>
<tbody>
{% for row in s.scores %}
<tr><td class="label">{{ row.label }}</td>
<td class="number" data-label="model">{{ row.value }}</td>
<td class="number" data-label="95 % interval">{{ row.interval }}</td>
<td class="number" data-label="on noise">{{ row.noise }}</td>
<td class="number" data-label="shuffled">{{ row.shuffled }}</td></tr>
{% endfor %}
</tbody></table></div>
{% for line in s.scored %}
<p class="faint">{{ line }}</p>
{% endfor %}
{% endfor %}

{% macro alert_rows(alerts) %}
<div class="wide"><table class="stack">
<thead><tr><th>step</th><th>severity</th><th>what was seen</th><th>likely cause</th><th>try</th>
</tr>
</thead><tbody>
{% for a in alerts %}
<tr><td class="number" data-label="step">{{ a.step }}</td>
<td class="grade {{ {'critical': 'critical', 'warning': 'concerning'}.get(a.severity, '') }}">
{{ a.severity }}</td>
<td>{{ a.message }}</td><td data-label="likely cause">{{ a.get('cause', '') }}</td>
<td data-label="try">{{ a.get('remedy', '') }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% for s in summaries if summaries|length == 1 and s.alerts or s.alarms %}
<h2>Alerts{% if summaries|length > 1 %} of {{ s.name }}{% endif %}</h2>
{% set told = s.alerts if summaries|length == 1 else s.alarms %}
{% if told|length > shown_alerts %}
<details><summary>{{ told|length - shown_alerts }} earlier alerts</summary>
{{ alert_rows(told[:-shown_alerts]) }}</details>
{% endif %}
{{ alert_rows(told[-shown_alerts:]) }}
{% endfor %}

{% for heading, plots in sections %}
<h2>{{ heading }}</h2>
{% if heading == 'Over time' %}
<p class="faint">{% if summaries|length == 1 %}Dashed lines: phases. Triangles: alerts (red
critical, amber warning, blue info). A line is interrupted where a component is frozen or a loss not
computed.{% else %}All runs on the same axes.{% endif %}</p>
{% endif %}
<div class="plots">
{% for plot in plots %}
<figure id="{{ plot.name }}"><h3>{{ plot.title }}</h3>
{{ plot.svg|safe }}</figure>
{% endfor %}
</div>
{% else %}
<h2>Over time</h2>
<p>Nothing was recorded yet: figures appear after the first log step.</p>
{% endfor %}

{% if examples %}
<h2>Decoded examples</h2>
<div class="wide"><table class="stack">
<thead><tr><th>trial</th><th>target</th><th>output</th><th>of noise</th></tr></thead><tbody>
{% for p in examples %}
<tr><td class="faint">{{ p.row }}</td><td data-label="target">{{ p.target }}</td>
<td data-label="output">{{ p.prediction }}</td>
<td class="faint" data-label="of noise">{{ p.get('noise_prediction') or '' }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}

<h2>What to try next</h2>
{% for s in summaries %}
{% if summaries|length > 1 %}<h3>{{ s.name }}</h3>{% endif %}
{% if s.advice %}
<ul>
{% for a in s.advice %}
<li><strong>{{ a.symptom }}</strong>{% if a.cause %} – {{ a.cause }}{% endif %}.
Try: {{ a.remedy }}.</li>
{% endfor %}
</ul>
{% else %}
<p>{{ 'Nothing was measured yet.' if s.verdict == 'unknown' or not s.measured else
'Nothing in the table asks for a change.' }}</p>
{% endif %}
{% endfor %}
{% if sizing.rows or sizing.left_out %}
<h3>How many codes the data bear</h3>
{% for text in sizing.text %}<p>{{ text }}</p>{% endfor %}
{% for run in sizing.left_out %}<p class="faint">Left out: {{ run }}.</p>{% endfor %}
{% endif %}
{% if sizing.rows %}
<div class="plots">
<figure id="sizing"><h3>{{ sizing_figure.title }}</h3>
{{ sizing_figure.svg|safe }}</figure>
<div><div class="wide"><table>
<thead><tr><th>codes</th><th>perplexity, curve</th><th>of K</th><th>measured</th></tr></thead>
<tbody>
{% for row in sizing.rows %}
<tr><td class="number">{{ row.codes }}</td><td class="number">{{ row.perplexity }}</td>
<td class="number">{{ row.share }}</td><td class="number">{{ row.measured }}</td></tr>
{% endfor %}
</tbody></table></div></div>
</div>
{% endif %}

{% if config or environment %}
<h2>Configuration and environment</h2>
{% if config %}<details><summary>config.yaml</summary><pre>{{ config }}</pre></details>{% endif %}
<div class="wide"><table><tbody>
{% for name, value in environment %}
<tr><td class="faint">{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</main>
</body>
</html>
"""
