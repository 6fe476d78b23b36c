//! A judgement as people read it.

use comfy_table::{CellAlignment, Table, presets};

use super::{Judgement, Verdict};

/// The judgement as tables.
#[must_use]
pub fn table(judgement: &Judgement) -> String {
    let mut text = String::new();
    if let Some(commit) = &judgement.commit {
        text.push_str(&format!("work tree at {commit}\n"));
    }
    text.push_str(&format!("program {}\n", judgement.program));
    for (counts, heading) in [(true, "sets that count"), (false, "other sets, for comparison")] {
        let verdicts: Vec<&Verdict> = judgement.verdicts.iter().filter(|v| v.counts == counts).collect();
        if !counts && verdicts.iter().all(|verdict| verdict.value.is_none()) {
            continue;
        }
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.set_header([heading, "aim", "value", "95 % interval", "", "sets/domains/entities"]);
        for v in verdicts {
            let interval = match (v.low, v.high) {
                (Some(low), Some(high)) => format!("{low:.4} to {high:.4}"),
                _ => "-".to_owned(),
            };
            table.add_row([
                format!("{}: {}", v.flow, v.what),
                v.aim.clone(),
                v.value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}")),
                interval,
                v.word().to_owned(),
                format!("{}/{}/{}", v.sets.len(), v.domains, v.entities),
            ]);
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        text.push_str(&format!("{table}\n"));
    }
    for own in &judgement.own_trees {
        text.push_str(&format!(
            "{} ({}): of {} domains {:.0} % end on their own trees alone, {:.0} % on trees alone; mean weights: own trees \
             {:.3}, trees with the corpus {:.3}, the model {:.3}\n",
            own.flow,
            if own.counts { "sets that count" } else { "other sets" },
            own.domains,
            100.0 * own.own_rows_alone,
            100.0 * own.no_model,
            own.weight_of_own_trees,
            own.weight_of_trees_and_corpus,
            own.weight_of_model
        ));
    }
    text
}

impl Verdict {
    /// `met`, `missed`, or that there is nothing to judge yet.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match (self.value, self.complete, self.met) {
            (None, _, _) => "no figures",
            (_, false, _) => "incomplete",
            (_, _, true) => "met",
            (_, _, false) => "missed",
        }
    }
}
