//! The page itself: what was run, the table, and a picture for each question.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::super::document::Scenario;
use super::super::results::{Manifest, Row};
use super::super::run::{DUPLICATES, MODEL, RIVALS};
use super::super::targets::{Judgement, Verdict};
use super::plot::{Axes, Series, bars, escape, lines, number, reliability, scatter};
use super::summary::{Method, domains, last, mean, methods, sets};

/// Draws the page of a run's rows.
pub(super) fn page(
    scenario: &Scenario,
    manifest: &Manifest,
    rows: &[Row],
    judgement: Option<&Judgement>,
) -> String {
    let mut html = String::new();
    let name = escape(&scenario.name);
    let _ = write!(
        html,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\"><title>{name}</title><style>{STYLE}</style></head><body>\
         <header><h1>{name}</h1><p class=\"facts\">{}</p></header>",
        facts(manifest)
    );
    let last = last(rows);
    if let Some(judgement) = judgement {
        aims(&mut html, judgement);
    }
    duplicates(&mut html, &last);
    table(&mut html, &last);
    newcomers(&mut html, &last);
    curves(&mut html, rows);
    privacy(&mut html, &last);
    for set in sets(last.iter().copied()) {
        by_domain(&mut html, set, &last);
    }
    calibration(&mut html, &last);
    blends(&mut html, &last);
    rounds(&mut html, rows);
    let _ = write!(
        html,
        "<details><summary>Scenario and origin</summary><dl><dt>scenario</dt><dd><code>{}</code></dd>\
         <dt>base model</dt><dd><code>{}</code></dd>{}</dl><pre>{}</pre></details></body></html>",
        manifest.scenario_digest,
        manifest.base_model,
        manifest
            .sets
            .iter()
            .map(|set| format!("<dt>{}</dt><dd><code>{}</code></dd>", escape(&set.name), set.digest))
            .collect::<String>(),
        escape(&serde_json::to_string_pretty(scenario).unwrap_or_default())
    );
    html
}

fn facts(manifest: &Manifest) -> String {
    let names: Vec<String> = manifest.sets.iter().map(|set| escape(&set.name)).collect();
    let seeds = if manifest.seeds == 1 { "one seed".to_owned() } else { format!("{} seeds", manifest.seeds) };
    let part = if manifest.shard.of > 1 {
        format!(" Part {} of {}.", manifest.shard.part, manifest.shard.of)
    } else {
        String::new()
    };
    format!(
        "{}, {seeds}, program {}. Noise is drawn from the seed: reproducible, not private.{part}",
        names.join(", "),
        escape(&manifest.program)
    ) + &manifest.commit.as_ref().map_or_else(String::new, |c| format!(" Work tree at {}.", escape(c)))
        + if manifest.real { " Flows ran as processes." } else { "" }
}

/// What was aimed at, and what came of it.
fn aims(html: &mut String, judgement: &Judgement) {
    for (counts, heading) in [(true, "Targets"), (false, "The same figures over the other sets")] {
        let verdicts: Vec<&Verdict> = judgement.verdicts.iter().filter(|v| v.counts == counts).collect();
        if !counts && verdicts.iter().all(|verdict| verdict.value.is_none()) {
            continue;
        }
        let _ = write!(
            html,
            "<section><h2>{heading}</h2><p>Value with its 95 % interval from a paired bootstrap over sets, domains, seeds and, where answers were kept, test entities.</p><div class=\"wide\"><table><thead><tr><th>figure</th><th>aim</th><th>value</th><th>interval</th><th></th><th>sets / domains / entities</th></tr></thead><tbody>"
        );
        for v in verdicts {
            let figure = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |v| format!("{v:.4}"));
            let _ = write!(
                html,
                "<tr><th>{}: {}</th><td>{}</td><td>{}</td><td>{} to {}</td><td>{}</td><td>{} / {} / {}</td></tr>",
                escape(&v.flow),
                escape(&v.what),
                escape(&v.aim),
                figure(v.value),
                figure(v.low),
                figure(v.high),
                v.word(),
                v.sets.len(),
                v.domains,
                v.entities
            );
        }
        html.push_str("</tbody></table></div><ul>");
        for own in judgement.own_trees.iter().filter(|own| own.counts == counts) {
            let _ = write!(
                html,
                "<li>{}: of {} domains {:.0} % end on their own trees alone, {:.0} % on trees alone.</li>",
                escape(&own.flow),
                own.domains,
                100.0 * own.own_rows_alone,
                100.0 * own.no_model
            );
        }
        html.push_str("</ul></section>");
    }
}

/// Test rows that stand among training rows.
fn duplicates(html: &mut String, last: &[&Row]) {
    let own: Vec<&Row> =
        last.iter().copied().filter(|row| row.arm == DUPLICATES && row.domain == "*").collect();
    if own.is_empty() {
        return;
    }
    let figures = [
        ("test_rows", "test rows"),
        ("among_own_training_rows", "among own training rows"),
        ("among_own_training_rows_with_its_label", "with the same label"),
        ("among_all_training_rows", "among all training rows"),
        ("entities_in_training_too", "entities in both"),
    ];
    html.push_str("<section><h2>Duplicates</h2><p>Test rows whose features all equal those of a training row, and entities on both sides of the split.</p><div class=\"wide\"><table><thead><tr><th>set</th>");
    figures.iter().for_each(|(_, shown)| html.push_str(&format!("<th>{shown}</th>")));
    html.push_str("</tr></thead><tbody>");
    for set in sets(own.iter().copied()) {
        let _ = write!(html, "<tr><th>{}</th>", escape(set));
        for (metric, _) in figures {
            let found = own.iter().find(|row| row.set == set && row.metric == metric).map(|row| row.value);
            let shown = match found {
                None => "–".to_owned(),
                Some(value) if metric == "test_rows" => format!("{value:.0}"),
                Some(value) => format!("{:.2} %", 100.0 * value),
            };
            let _ = write!(html, "<td>{shown}</td>");
        }
        html.push_str("</tr>");
    }
    html.push_str("</tbody></table></div></section>");
}

/// One line a method: means over domains and sets, with standard errors over seeds.
fn table(html: &mut String, last: &[&Row]) {
    let figures = [
        ("auc", "AUC"),
        ("log_loss", "log loss"),
        ("brier", "Brier"),
        ("calibration_slope", "slope"),
        ("calibration_intercept", "intercept"),
    ];
    let present: Vec<&(&str, &str)> =
        figures.iter().filter(|(metric, _)| last.iter().any(|row| row.metric == *metric)).collect();
    if present.is_empty() {
        return;
    }
    html.push_str("<section><h2>Test figures</h2><p>Plain means over the domains with at least ten test rows of each class, then over sets and seeds; ± is one standard error over seeds. A calibrated slope is 1, a calibrated intercept 0.</p><div class=\"wide\"><table><thead><tr><th>method</th><th>noise</th>");
    for (_, shown) in &present {
        let _ = write!(html, "<th>{shown}</th>");
    }
    html.push_str("</tr></thead><tbody>");
    let own: Vec<&Row> = last.iter().copied().filter(|row| row.rows.is_none()).collect();
    for method in methods(own.iter().copied()) {
        let rows = || of(&own, &method);
        if present.iter().all(|(metric, _)| mean(rows(), metric).is_none()) {
            continue;
        }
        let noise = rows().next().map_or("", |row| row.noise.shown());
        let _ = write!(html, "<tr><th>{}</th><td>{noise}</td>", escape(&method.shown()));
        for (metric, _) in &present {
            html.push_str("<td>");
            if let Some(found) = mean(rows(), metric) {
                let _ = write!(html, "{:.4}", found.mean);
                if let Some(error) = found.error {
                    let _ = write!(html, " <small>± {error:.4}</small>");
                }
            } else {
                html.push('–');
            }
            html.push_str("</td>");
        }
        html.push_str("</tr>");
    }
    html.push_str("</tbody></table></div>");
    let mut left: Vec<String> = own
        .iter()
        .filter(|row| !row.counted && row.domain != "*")
        .map(|row| format!("{}/{}", row.set, row.domain))
        .collect();
    left.sort();
    left.dedup();
    if !left.is_empty() {
        let _ = write!(html, "<p>Not in means: {}.</p>", escape(&left.join(", ")));
    }
    html.push_str("</section>");
}

/// Domains that took part in nothing, by number of own rows.
fn newcomers(html: &mut String, last: &[&Row]) {
    let own: Vec<&Row> = last.iter().copied().filter(|row| row.rows.is_some()).collect();
    if own.is_empty() {
        return;
    }
    let mut sizes: Vec<u32> = own.iter().filter_map(|row| row.rows).collect();
    sizes.sort_unstable();
    sizes.dedup();
    html.push_str("<section><h2>Newcomers</h2><p>Left-out domains, AUC and log loss, means over draws of so many own rows, then over sets and seeds.</p><div class=\"wide\"><table><thead><tr><th>method</th><th>noise</th>");
    for size in &sizes {
        let _ = write!(html, "<th>{size} rows, AUC</th><th>{size} rows, log loss</th>");
    }
    html.push_str("</tr></thead><tbody>");
    for method in methods(own.iter().copied()) {
        let noise = of(&own, &method).next().map_or("", |row| row.noise.shown());
        let _ = write!(html, "<tr><th>{}</th><td>{noise}</td>", escape(&method.shown()));
        for size in &sizes {
            for metric in ["auc", "log_loss"] {
                let rows = of(&own, &method).filter(|row| row.rows == Some(*size));
                let shown = mean(rows, metric).map_or_else(
                    || "–".to_owned(),
                    |m| match m.error {
                        Some(error) => format!("{:.4} <small>± {error:.4}</small>", m.mean),
                        None => format!("{:.4}", m.mean),
                    },
                );
                let _ = write!(html, "<td>{shown}</td>");
            }
        }
        html.push_str("</tr>");
    }
    html.push_str("</tbody></table></div></section>");
}

/// Figures by round.
fn curves(html: &mut String, rows: &[Row]) {
    let mut pictures = String::new();
    for (metric, shown) in [("auc", "AUC"), ("log_loss", "log loss")] {
        let mut series = Vec::new();
        for method in methods(rows.iter().filter(|row| row.round.is_some() && row.domain != "*")) {
            let mut by_round: BTreeMap<u32, Vec<&Row>> = BTreeMap::new();
            for row in rows.iter().filter(|row| is(row, &method) && row.metric == metric) {
                if let Some(round) = row.round {
                    by_round.entry(round).or_default().push(row);
                }
            }
            let points: Vec<(f64, f64)> = by_round
                .iter()
                .filter_map(|(round, rows)| {
                    Some((f64::from(*round), mean(rows.iter().copied(), metric)?.mean))
                })
                .collect();
            if points.len() > 1 {
                series.push(Series { name: method.shown(), points });
            }
        }
        if !series.is_empty() {
            let points = series.iter().flat_map(|s| s.points.iter().copied());
            let axes = Axes::around("round", shown, points);
            let _ =
                write!(pictures, "<figure>{}</figure>", lines(&format!("{shown} by round"), &axes, &series));
        }
    }
    if !pictures.is_empty() {
        let _ = write!(
            html,
            "<section><h2>Learning curves</h2><p>Means over domains, sets and seeds after each evaluated round.</p><div class=\"pair\">{pictures}</div></section>"
        );
    }
}

/// ε that was spent against what it bought.
fn privacy(html: &mut String, last: &[&Row]) {
    let mut pictures = String::new();
    for (metric, shown) in [("auc", "AUC"), ("log_loss", "log loss")] {
        let mut points = Vec::new();
        let mut level = Vec::new();
        for method in methods(last.iter().copied()) {
            let Some(height) = mean(of(last, &method).filter(|row| row.rows.is_none()), metric) else {
                continue;
            };
            let spent = mean(of(last, &method), "epsilon");
            match spent {
                Some(epsilon) => {
                    let points_of = vec![(epsilon.mean, height.mean)];
                    points.push(Series { name: method.shown(), points: points_of });
                }
                None if method.arm == RIVALS || method.method == MODEL => {
                    level.push(Series {
                        name: format!("{} (no noise)", method.shown()),
                        points: vec![(0.0, height.mean)],
                    });
                }
                None => {}
            }
        }
        if points.is_empty() {
            continue;
        }
        let heights = points.iter().chain(&level).flat_map(|s| s.points.iter().map(|p| p.1));
        let reach = points.iter().flat_map(|s| s.points.iter().map(|p| p.0)).fold(0.0, f64::max);
        let framed = heights.flat_map(|y| [(0.0, y), (reach, y)]);
        let mut axes = Axes::around("ε spent", shown, framed);
        axes.x_range.0 = 0.0;
        let title = format!("{shown} against epsilon");
        let _ = write!(pictures, "<figure>{}</figure>", scatter(&title, &axes, &points, &level));
    }
    if !pictures.is_empty() {
        let _ = write!(
            html,
            "<section><h2>Privacy and utility</h2><p>The ε that domains' ledgers have spent, in the mean, against what came of it; dashed lines have no noise.</p><div class=\"pair\">{pictures}</div></section>"
        );
    }
}

/// Bars for every domain of a set.
fn by_domain(html: &mut String, set: &str, last: &[&Row]) {
    let own: Vec<&Row> = last
        .iter()
        .copied()
        .filter(|row| row.set == set && row.rows.is_none() && row.metric == "auc")
        .collect();
    let names = domains(own.iter().copied());
    let mut shown = methods(own.iter().copied());
    if names.is_empty() || shown.is_empty() {
        return;
    }
    let all = shown.len();
    served_first(&mut shown);
    shown.truncate(MOST_BARS);
    let groups: Vec<(String, Vec<Option<f64>>)> = names
        .iter()
        .take(MOST_DOMAINS)
        .map(|domain| {
            let value = |method: &Method| {
                let values: Vec<f64> =
                    of(&own, method).filter(|row| row.domain == *domain).map(|row| row.value).collect();
                (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
            };
            ((*domain).to_owned(), shown.iter().map(value).collect())
        })
        .collect();
    let values = || groups.iter().flat_map(|(_, values)| values.iter().flatten().copied());
    let least = values().fold(1.0, f64::min);
    let range = (((least - 0.02).max(0.0) * 20.0).floor() / 20.0, 1.0);
    let labels: Vec<String> = shown.iter().map(Method::shown).collect();
    let _ = write!(
        html,
        "<section><h2>Domains of {}</h2><p>AUC on each domain's test rows, mean over seeds.",
        escape(set)
    );
    if names.len() > MOST_DOMAINS || all > shown.len() {
        let _ = write!(
            html,
            " Shown: {} of {} domains, {} of {all} methods; the rows have all.",
            names.len().min(MOST_DOMAINS),
            names.len(),
            shown.len()
        );
    }
    let _ = write!(
        html,
        " Bars start at {}.</p><figure>{}</figure></section>",
        number(range.0),
        bars(&format!("AUC by domain of {set}"), &groups, &labels, range)
    );
}

/// What is served and trained first, then the rivals, then the steps on the way.
fn served_first(methods: &mut [Method]) {
    methods.sort_by_key(|method| match method.method.as_str() {
        "served" | MODEL => 0,
        _ if method.arm == RIVALS => 1,
        _ => 2,
    });
}

/// Observed shares by predicted probability.
fn calibration(html: &mut String, last: &[&Row]) {
    let mut series = Vec::new();
    let mut shown = methods(last.iter().copied());
    served_first(&mut shown);
    for method in shown {
        let sum = |tenth: usize, what: &str| -> Vec<f64> {
            let metric = format!("reliability_{tenth}_{what}");
            of(last, &method).filter(|row| row.metric == metric).map(|row| row.value).collect()
        };
        let mut points = Vec::new();
        for tenth in 0..10 {
            let (n, predicted, observed) =
                (sum(tenth, "rows"), sum(tenth, "predicted"), sum(tenth, "observed"));
            let total: f64 = n.iter().sum();
            if total < FEWEST_ROWS {
                continue;
            }
            let weighted = |values: &[f64]| values.iter().zip(&n).map(|(v, n)| v * n).sum::<f64>() / total;
            points.push((weighted(&predicted), weighted(&observed)));
        }
        if !points.is_empty() {
            series.push(Series { name: method.shown(), points });
        }
    }
    if series.is_empty() {
        return;
    }
    series.truncate(MOST_LINES);
    let _ = write!(
        html,
        "<section><h2>Calibration</h2><p>Observed share of class 1 by tenth of predicted probability, all domains together; tenths with fewer than {FEWEST_ROWS} rows are left out. On the dotted line predictions are calibrated.</p><figure class=\"half\">{}</figure></section>",
        reliability("observed share by predicted probability", &series)
    );
}

/// What domains chose to serve.
fn blends(html: &mut String, last: &[&Row]) {
    let own = last.iter().copied().filter(|row| row.rows.is_none());
    let weights: Vec<&Row> = own.filter(|row| row.metric.starts_with("weight of ")).collect();
    if weights.is_empty() {
        return;
    }
    html.push_str("<section><h2>What domains serve</h2><p>Share of domains whose blend a member is in, and its mean weight over all domains.</p><div class=\"wide\"><table><thead><tr><th>flow</th><th>member</th><th>in domains</th><th>mean weight</th></tr></thead><tbody>");
    let mut seen: BTreeMap<(&str, &str), (usize, f64)> = BTreeMap::new();
    let mut blends: BTreeMap<&str, std::collections::BTreeSet<(&str, u64, &str)>> = BTreeMap::new();
    for row in &weights {
        let member = row.metric.trim_start_matches("weight of ");
        let entry = seen.entry((&row.arm, member)).or_default();
        *entry = (entry.0 + usize::from(row.value > 0.0), entry.1 + row.value);
        blends.entry(&row.arm).or_default().insert((&row.set, row.seed, &row.domain));
    }
    for ((arm, member), (times, weight)) in seen {
        let n = blends.get(arm).map_or(1, std::collections::BTreeSet::len) as f64;
        let _ = write!(
            html,
            "<tr><th>{}</th><td>{}</td><td>{:.0} %</td><td>{:.3}</td></tr>",
            escape(arm),
            escape(member),
            100.0 * times as f64 / n,
            weight / n
        );
    }
    html.push_str("</tbody></table></div></section>");
}

/// Updates by fate.
fn rounds(html: &mut String, rows: &[Row]) {
    let fates = [
        ("updates_accepted", "accepted"),
        ("updates_dropped", "dropped"),
        ("updates_late", "late or stale"),
        ("updates_screened", "screened out"),
        ("updates_over_budget", "over budget"),
        ("rounds_abandoned", "rounds abandoned"),
    ];
    let arms = methods(rows.iter().filter(|row| row.metric == "updates_accepted"));
    if arms.is_empty() {
        return;
    }
    html.push_str("<section><h2>Rounds</h2><p>Updates by what became of them, and rounds without a step, over all sets and seeds.</p><div class=\"wide\"><table><thead><tr><th>federation</th>");
    for (_, shown) in fates {
        let _ = write!(html, "<th>{shown}</th>");
    }
    html.push_str("</tr></thead><tbody>");
    for method in arms {
        let _ = write!(html, "<tr><th>{}</th>", escape(&method.arm));
        for (metric, _) in fates {
            let total: f64 =
                rows.iter().filter(|row| is(row, &method) && row.metric == metric).map(|row| row.value).sum();
            let _ = write!(html, "<td>{total:.0}</td>");
        }
        html.push_str("</tr>");
    }
    html.push_str("</tbody></table></div></section>");
}

fn is(row: &Row, method: &Method) -> bool {
    row.arm == method.arm && row.method == method.method
}

fn of<'a>(rows: &[&'a Row], method: &Method) -> impl Iterator<Item = &'a Row> {
    rows.iter().copied().filter(|row| is(row, method)).collect::<Vec<_>>().into_iter()
}

/// Bars of one domain.
const MOST_BARS: usize = 6;
/// Domains in a picture.
const MOST_DOMAINS: usize = 24;
/// Lines in the calibration picture.
const MOST_LINES: usize = 8;
/// Rows of a tenth that is drawn.
const FEWEST_ROWS: f64 = 20.0;

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1d2329;--soft:#5d6872;--line:#dde2e7;--ground:#fff}\
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#9aa5b0;--line:#39424b;--ground:#14181c}}\
body{margin:2rem auto;padding:0 1.25rem;max-width:70rem;background:var(--ground);color:var(--ink);\
font:15px/1.5 system-ui,sans-serif}h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .3rem}\
p{margin:.2rem 0 .8rem;color:var(--soft);max-width:60rem}.wide{overflow-x:auto}\
table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
th,td{padding:.3rem .8rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}\
th:first-child{text-align:left;font-weight:500}thead th{color:var(--soft);font-weight:500}small{color:var(--soft)}\
figure{margin:.5rem 0 1rem;max-width:46rem}.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(24rem,1fr));gap:1.5rem}\
.half{max-width:34rem}svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font:11px system-ui,sans-serif}\
svg .axis{font-size:12px;fill:var(--ink)}svg .grid{stroke:var(--line)}svg .ideal{stroke:var(--soft);stroke-dasharray:2 4}\
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;list-style:none;margin:.3rem 0 0;padding:0 0 0 3rem;font-size:13px}\
.legend span{display:inline-block;margin-right:.4rem;vertical-align:middle}.dot{width:10px;height:10px;border-radius:50%;background:var(--c)}\
.dash{width:18px;border-top:2px dashed var(--c)}details{margin:2.5rem 0}summary{cursor:pointer}\
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}dd{margin:0;overflow-wrap:anywhere}\
pre{overflow-x:auto;padding:.8rem;border:1px solid var(--line);font-size:12px}";
