//! The strategy that docs/RESEARCH.md shows, written against the public interface: what stands there compiles and decays.

use tabmesh_federation::aggregate::optimiser::OptimiserSpec;
use tabmesh_federation::aggregate::strategy::{FederatedStrategy, LocalWork, PLAIN_STEP, Pace, Point};
use tabmesh_federation::aggregate::{Aggregate, FedSgd, Rule};

// SHOWN
/// Local gradients with decay toward zero.
pub struct FedDecay {
    /// Share of the weights that a unit of rate takes off.
    pub decay: f64,
}

impl FederatedStrategy for FedDecay {
    fn kind(&self) -> &'static str {
        "feddecay"
    }
    fn paper(&self) -> &'static str {
        "…"
    }
    fn rule(&self) -> Rule {
        Rule::FedSgd(FedSgd {})
    }
    fn optimiser(&self) -> OptimiserSpec {
        PLAIN_STEP
    }
    fn correct(&self, at: &Point<'_>, gradient: &mut [f64]) {
        gradient.iter_mut().zip(at.now).for_each(|(g, w)| *g += self.decay * w);
    }
}
// SHOWN

/// The page's block and the code above, without white space and the commas that come with line breaks.
#[test]
fn the_page_shows_this_strategy() {
    let bare = |text: &str| -> String { text.chars().filter(|c| !c.is_whitespace() && *c != ',').collect() };
    let shown = include_str!("own_strategy.rs").split("// SHOWN\n").nth(1).unwrap_or_default();
    let page = include_str!("../../../docs/RESEARCH.md");
    assert!(shown.len() > 400, "the block was found");
    assert!(bare(page).contains(&bare(shown)), "docs/RESEARCH.md shows another strategy");
}

/// On a loss of zero, so many steps of rate r shrink a model by (1 − r · decay) each; nothing else is its own.
#[test]
fn it_decays_and_takes_the_rest_from_the_family() {
    let strategy = FedDecay { decay: 0.5 };
    let start = [1.0, -2.0, 0.0];
    let (mut now, zeros) = (start, [0.0; 3]);
    for _ in 0..3 {
        let mut gradient = [0.0; 3];
        strategy.correct(&Point { start: &start, now: &now, own: &zeros, shared: &zeros }, &mut gradient);
        now.iter_mut().zip(gradient).for_each(|(w, g)| *w -= 0.5 * g);
    }
    let expected = start.map(|w| w * 0.75_f64.powi(3));
    assert_eq!(now.map(f64::to_bits), expected.map(f64::to_bits));
    assert_eq!((strategy.local_work(), strategy.pace()), (LocalWork::Steps, Pace::Rounds));
    assert!(!strategy.keeps_controls() && !strategy.rule().needs_separate_updates());
}
