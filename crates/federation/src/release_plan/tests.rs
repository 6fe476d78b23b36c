//! Queries as derived, and attacks on them.

#![allow(clippy::unwrap_used, reason = "tests")]

use tabmesh_contract::schema::{NumericDomain, Target};

use super::*;
use crate::id::AgentId;

fn numeric(id: &str, lower: f64, upper: f64) -> Feature {
    let domain = NumericDomain { lower, upper, scale: Scale::Linear, cut_points: None };
    Feature {
        id: FeatureId::new(id).unwrap(),
        kind: FeatureKind::Numeric(domain),
        unit: None,
        description: None,
    }
}

fn categorical(id: &str, levels: &[&str]) -> Feature {
    let kind = FeatureKind::Categorical { levels: levels.iter().map(|l| (*l).to_owned()).collect() };
    Feature { id: FeatureId::new(id).unwrap(), kind, unit: None, description: None }
}

fn target() -> Target {
    Target { id: FeatureId::new("person.rich").unwrap(), classes: vec!["no".into(), "yes".into()] }
}

fn with_cuts() -> Feature {
    let mut feature = numeric("c.cuts", 0.0, 10.0);
    if let FeatureKind::Numeric(domain) = &mut feature.kind {
        domain.cut_points = Some((1..10).map(f64::from).collect());
    }
    feature
}

fn log_scaled() -> Feature {
    let mut feature = numeric("d.log", 0.0, 1e6);
    if let FeatureKind::Numeric(domain) = &mut feature.kind {
        domain.scale = Scale::Log1p;
    }
    feature
}

fn schema() -> FeatureSchema {
    let levels: Vec<String> = (0..40).map(|i| format!("l{i}")).collect();
    let levels: Vec<&str> = levels.iter().map(String::as_str).collect();
    let features =
        vec![numeric("a.age", 0.0, 100.0), categorical("b.job", &levels), with_cuts(), log_scaled()];
    FeatureSchema::new(features, target()).unwrap()
}

/// Agents of the cohort.
const AGENTS: usize = 3;

fn plan() -> (Plan, PlanDigest) {
    Plan::parse(b"kind: TabmeshPlan\nname: p\ntarget: person.rich\n", "p.yaml").unwrap()
}

fn asked(marginals: &[&[usize]]) -> Vec<MarginalSpec> {
    marginals.iter().map(|attributes| MarginalSpec { attributes: attributes.to_vec() }).collect()
}

struct Fixture {
    schema: FeatureSchema,
    plan: Plan,
    digest: PlanDigest,
}

impl Fixture {
    fn new() -> Self {
        let (plan, digest) = plan();
        Self { schema: schema(), plan, digest }
    }

    fn release(&self) -> Release<'_> {
        let budget = self.plan.budget().unwrap();
        Release {
            schema: &self.schema,
            plan: &self.plan,
            digest: self.digest,
            budget,
            max_rows_per_unit: 1,
            agents: AGENTS,
        }
    }

    fn check(&self, query: &ReleaseQuery) -> Result<(), QueryRefusal> {
        check_query(query, &self.schema, 1, &self.plan, &self.digest, AGENTS)
    }

    /// Tables of stage 1 as if 20,000 units had been summed: enough for every bin to be seen.
    fn tables(&self) -> Vec<MarginalTable> {
        let query = self.release().stage_one().unwrap();
        let counts: Vec<i64> = (0..query.cells_total()).map(|i| 400 + (i as i64 * 37) % 200).collect();
        query.tables(&counts, 3).unwrap()
    }

    fn all_stages(&self) -> Vec<ReleaseQuery> {
        let (release, tables) = (self.release(), self.tables());
        let finals = release.final_attributes(&tables).unwrap();
        let coarse = release.coarse_attributes(&tables).unwrap();
        vec![
            release.stage_one().unwrap(),
            release.stage_two(&finals).unwrap(),
            release.stage_three(&coarse).unwrap(),
            release.stage_four(&finals, asked(&[&[0, 4], &[1, 0, 4], &[2, 4], &[2, 1], &[3, 0, 4]])).unwrap(),
        ]
    }
}

#[test]
fn stage_one_counts_fine_cells_of_every_feature_and_the_label() {
    let fixture = Fixture::new();
    let query = fixture.release().stage_one().unwrap();
    let cells: Vec<usize> = query.attributes.iter().map(Attribute::cells).collect();
    // 128 bins and missing; 40 levels, other, missing; 10 declared bins and missing; 128 log bins and missing.
    assert_eq!(cells, vec![129, 42, 11, 129, 2]);
    assert_eq!(query.marginals.len(), 5);
    assert_eq!(query.rho, fixture.plan.budget().unwrap().per_stage[0]);
    assert!(matches!(&query.attributes[3].binning, Binning::Edges { log1p: true, .. }));
}

#[test]
fn every_derived_stage_passes_the_agents_own_check() {
    let fixture = Fixture::new();
    for query in fixture.all_stages() {
        fixture.check(&query).unwrap_or_else(|refusal| panic!("stage {}: {refusal}", query.stage));
        let bytes = query.to_json();
        fixture.check(&ReleaseQuery::from_json(&bytes).unwrap()).unwrap();
    }
}

#[test]
fn an_agent_with_more_features_than_the_cohort_accepts() {
    let fixture = Fixture::new();
    let mut features = fixture.schema.features().to_vec();
    features.push(numeric("e.extra", 0.0, 1.0));
    let own = FeatureSchema::new(features, target()).unwrap();
    for query in fixture.all_stages() {
        check_query(&query, &own, 1, &fixture.plan, &fixture.digest, AGENTS).unwrap();
    }
}

#[test]
fn later_stages_have_the_shapes_and_sizes_the_plan_allows() {
    let fixture = Fixture::new();
    let stages = fixture.all_stages();
    let shapes: Vec<Vec<usize>> =
        stages.iter().map(|q| q.marginals.iter().map(|m| m.attributes.len()).collect()).collect();
    assert_eq!(shapes[1], vec![2; 4]);
    assert_eq!(shapes[2], vec![2; 6]);
    assert_eq!(shapes[3], vec![2, 3, 2, 2, 3]);
    for attribute in &stages[2].attributes {
        assert!(attribute.cells() <= 6, "{attribute:?}");
    }
    for attribute in &stages[1].attributes {
        assert!(attribute.cells() <= 24, "{attribute:?}");
    }
}

#[test]
fn a_single_feature_still_has_four_stages() {
    let (plan, digest) = plan();
    let schema = FeatureSchema::new(vec![numeric("a.age", 0.0, 100.0)], target()).unwrap();
    let fixture = Fixture { schema, plan, digest };
    let (release, tables) = (fixture.release(), fixture.tables());
    let coarse = release.coarse_attributes(&tables).unwrap();
    let query = release.stage_three(&coarse).unwrap();
    fixture.check(&query).unwrap();
    let finals = release.final_attributes(&tables).unwrap();
    fixture.check(&release.stage_four(&finals, asked(&[&[0, 1]])).unwrap()).unwrap();
}

#[test]
fn a_stage_spends_no_more_than_the_smallest_noise_costs() {
    use crate::secagg::noise::NoisePlan;
    use tabmesh_privacy::mechanism::DiscreteGaussian;
    for delta_squared in [1, 2, 9, 1 << 20] {
        let rho = usable_rho(Rho::from_units(u64::MAX), delta_squared, None);
        let noise = DiscreteGaussian::from_rho(delta_squared, rho).unwrap();
        assert!((noise.sigma_squared().sigma() - 5.0).abs() < 1e-6);
        assert!(
            DiscreteGaussian::from_rho(delta_squared, Rho::from_units(rho.units() + delta_squared)).is_err()
        );
    }
    let little = Rho::from_units(77);
    assert_eq!(usable_rho(little, 4, None), little);
    // In a secure sum every share has at least the smallest deviation.
    for counted in [2, 3, 100] {
        let rho = usable_rho(Rho::from_units(u64::MAX), 9, Some(counted));
        let (agents, dropouts) = (counted as usize + 2, 1);
        let noise = NoisePlan::for_cost(9, rho, agents, dropouts, 1).unwrap();
        assert!((noise.share.sigma() - 5.0).abs() < 1e-6, "{counted}");
        let more = Rho::from_units(rho.units() + 9);
        assert!(NoisePlan::for_cost(9, more, agents, dropouts, 1).is_err(), "{counted}");
    }
}

#[test]
fn stage_four_asks_for_pairs_and_triples_of_its_kind_alone() {
    let fixture = Fixture::new();
    let finals = fixture.release().final_attributes(&fixture.tables()).unwrap();
    let four = |marginals: &[&[usize]]| fixture.release().stage_four(&finals, asked(marginals));
    fixture.check(&four(&[&[0, 4], &[0, 1], &[2, 3, 4]]).unwrap()).unwrap();
    for bad in [&[0][..], &[4, 0], &[0, 4, 1], &[0, 1, 2], &[4]] {
        assert_eq!(four(&[&[0, 4], bad]), Err(ReleasePlanError::Shape { index: 1 }), "{bad:?}");
    }
    assert_eq!(four(&[&[0, 1], &[1, 0]]), Err(ReleasePlanError::Shape { index: 1 }));
    assert!(matches!(four(&[&[0, 5]]), Err(ReleasePlanError::Query { stage: 4, .. })));
    assert!(matches!(four(&[]), Err(ReleasePlanError::Query { stage: 4, .. })));
    let missing = fixture.release().stage_two(&Attributes::new());
    let feature = FeatureId::new("a.age").unwrap();
    assert_eq!(missing, Err(ReleasePlanError::NoAttribute { feature }));
}

/// A change to a query, and the refusal an agent answers it with.
type Attack = (&'static str, usize, fn(&mut ReleaseQuery), fn(&QueryRefusal) -> bool);

#[test]
fn queries_that_ask_for_more_than_was_promised_are_refused_by_name() {
    use QueryRefusal as R;
    let attacks: &[Attack] = &[
        ("another plan", 0, |q| q.plan_digest = "00".into(), |r| matches!(r, R::Digest { .. })),
        ("stage nought", 0, |q| q.stage = 0, |r| matches!(r, R::Malformed(_) | R::Stage { got: 0 })),
        ("stage five", 0, |q| q.stage = 5, |r| matches!(r, R::Stage { got: 5 })),
        (
            "more budget",
            0,
            |q| q.rho = Rho::from_units(q.rho.units() + 1),
            |r| matches!(r, R::Cost { stage: 1, .. }),
        ),
        (
            "less budget",
            1,
            |q| q.rho = Rho::from_units(q.rho.units() - 1),
            |r| matches!(r, R::Cost { stage: 2, .. }),
        ),
        (
            "more rows a unit",
            0,
            |q| q.max_rows_per_unit = 2,
            |r| matches!(r, R::RowsPerUnit { expected: 1, got: 2 }),
        ),
        (
            "a feature not approved",
            0,
            |q| q.attributes[0].id = "a.salary".into(),
            |r| matches!(r, R::NotApproved { id } if id == "a.salary"),
        ),
        (
            "an id that is none",
            0,
            |q| q.attributes[0].id = "A B".into(),
            |r| matches!(r, R::NotApproved { .. }),
        ),
        (
            "a narrower range",
            0,
            |q| set_edges(q, 0, |lower, _, _| *lower = 0.1),
            |r| matches!(r, R::Cells { what: "declared range", .. }),
        ),
        (
            "a zoom by edges",
            0,
            |q| set_edges(q, 0, |_, _, edges| edges[5] += 0.3),
            |r| matches!(r, R::Cells { what: "fine bins of the declared range", .. }),
        ),
        (
            "fewer fine bins",
            0,
            |q| set_edges(q, 0, |_, _, edges| edges.truncate(126)),
            |r| matches!(r, R::Cells { what: "fine bins of the declared range", .. }),
        ),
        (
            "moved cut points",
            1,
            |q| set_edges(q, 2, |_, _, edges| edges[0] = 0.5),
            |r| matches!(r, R::Cells { what: "declared cut points", .. }),
        ),
        (
            "more levels",
            0,
            |q| q.attributes[1].binning = Binning::Levels { levels: 41 },
            |r| matches!(r, R::Cells { what: "number of levels", .. }),
        ),
        (
            "levels for a number",
            0,
            |q| q.attributes[0].binning = Binning::Levels { levels: 3 },
            |r| matches!(r, R::Cells { what: "type", .. }),
        ),
        (
            "more classes",
            0,
            |q| q.attributes[4].binning = Binning::Levels { levels: 3 },
            |r| matches!(r, R::Cells { what: "number of classes", .. }),
        ),
        (
            "a merge in stage one",
            0,
            |q| q.attributes[2].merge = Some(vec![0; 11]),
            |r| matches!(r, R::Cells { what: "stage 1 merges no cells", .. }),
        ),
        (
            "finer bins than planned",
            1,
            |q| set_edges(q, 0, |_, _, edges| *edges = (1..100).map(f64::from).collect()),
            |r| matches!(r, R::TooFine { stage: 2, limit: 9, got: 101, .. }),
        ),
        (
            "unmerged levels in the pairs",
            2,
            |q| q.attributes[1].merge = None,
            |r| matches!(r, R::TooFine { stage: 3, limit: 5, got: 42, .. }),
        ),
        (
            "a pair in stage one",
            0,
            |q| q.marginals[0].attributes = vec![2, 4],
            |r| matches!(r, R::Shape { stage: 1, index: 0 }),
        ),
        (
            "the label alone in stage two",
            1,
            |q| q.marginals[1].attributes = vec![4],
            |r| matches!(r, R::Shape { stage: 2, index: 1 }),
        ),
        (
            "a triple of features",
            3,
            |q| q.marginals[1].attributes = vec![0, 2, 3],
            |r| matches!(r, R::Shape { stage: 4, index: 1 }),
        ),
        (
            "a lone feature among pairs",
            2,
            |q| q.marginals[0].attributes = vec![0],
            |r| matches!(r, R::Shape { stage: 3, index: 0 }),
        ),
        (
            "one marginal twice",
            2,
            |q| q.marginals[1].attributes = vec![1, 0],
            |r| matches!(r, R::Shape { stage: 3, index: 1 }),
        ),
    ];
    let fixture = Fixture::new();
    let stages = fixture.all_stages();
    for (name, stage, change, expected) in attacks {
        let mut query = stages[*stage].clone();
        change(&mut query);
        let refusal = fixture.check(&query).expect_err(name);
        assert!(expected(&refusal), "{name}: {refusal:?}");
    }
}

fn set_edges(query: &mut ReleaseQuery, at: usize, change: fn(&mut f64, &mut f64, &mut Vec<f64>)) {
    if let Binning::Edges { lower, upper, edges, .. } = &mut query.attributes[at].binning {
        change(lower, upper, edges);
    }
}

#[test]
fn last_digits_of_a_logarithm_do_not_part_two_machines() {
    let fixture = Fixture::new();
    let mut query = fixture.release().stage_one().unwrap();
    set_edges(&mut query, 3, |_, _, edges| edges.iter_mut().for_each(|e| *e *= 1.0 + 4.0 * f64::EPSILON));
    fixture.check(&query).unwrap();
}

fn agent(name: &str) -> AgentId {
    AgentId::new(name).unwrap()
}

fn pair(a: Vec<Feature>, b: Vec<Feature>) -> BTreeMap<AgentId, FeatureSchema> {
    [("a", a), ("b", b)]
        .into_iter()
        .map(|(n, f)| (agent(n), FeatureSchema::new(f, target()).unwrap()))
        .collect()
}

#[test]
fn features_in_every_contract_are_shared() {
    let schemas = pair(
        vec![numeric("x", 0.0, 1.0), numeric("y", 0.0, 1.0)],
        vec![numeric("y", 0.0, 1.0), categorical("z", &["p", "q"])],
    );
    let shared = shared_schema(&schemas, &target().id).unwrap();
    let ids: Vec<&str> = shared.features().iter().map(|f| f.id.as_str()).collect();
    assert_eq!(ids, ["y"]);
    let none = pair(vec![numeric("x", 0.0, 1.0)], vec![numeric("y", 0.0, 1.0)]);
    assert!(matches!(shared_schema(&none, &target().id), Err(SharedError::Empty { .. })));
    assert_eq!(shared_schema(&BTreeMap::new(), &target().id), Err(SharedError::NoContract));
}

#[test]
fn contracts_that_mean_different_things_are_refused_by_name() {
    let mut log = numeric("x", 0.0, 10.0);
    let mut cuts = log.clone();
    let mut euro = log.clone();
    let mut dollar = log.clone();
    if let FeatureKind::Numeric(domain) = &mut log.kind {
        domain.scale = Scale::Log1p;
    }
    if let FeatureKind::Numeric(domain) = &mut cuts.kind {
        domain.cut_points = Some(vec![5.0]);
    }
    euro.unit = Some("EUR".into());
    dollar.unit = Some("USD".into());
    let plain = numeric("x", 0.0, 10.0);
    for (a, b, what) in [
        (plain.clone(), numeric("x", 0.0, 11.0), "range"),
        (plain.clone(), log, "scale"),
        (plain.clone(), cuts, "cut points"),
        (plain.clone(), categorical("x", &["p"]), "type"),
        (categorical("x", &["p", "q"]), categorical("x", &["q", "p"]), "levels"),
        (euro.clone(), dollar, "unit of measure"),
    ] {
        let feature = FeatureId::new("x").unwrap();
        let expected = SharedError::Feature { feature, first: agent("a"), second: agent("b"), what };
        assert_eq!(shared_schema(&pair(vec![a], vec![b]), &target().id), Err(expected));
    }
    assert!(shared_schema(&pair(vec![euro], vec![plain]), &target().id).is_ok());

    let mut schemas = pair(vec![numeric("x", 0.0, 1.0)], vec![numeric("x", 0.0, 1.0)]);
    let classes = Target { classes: vec!["yes".into(), "no".into()], ..target() };
    schemas.insert(agent("b"), FeatureSchema::new(vec![numeric("x", 0.0, 1.0)], classes).unwrap());
    let (first, second) = (agent("a"), agent("b"));
    let expected = SharedError::Classes { target: target().id, first, second };
    assert_eq!(shared_schema(&schemas, &target().id), Err(expected));

    let other = FeatureId::new("person.poor").unwrap();
    let wrong = shared_schema(&schemas, &other);
    assert!(matches!(wrong, Err(SharedError::Target { agent, .. }) if agent.as_str() == "a"));
}

#[test]
fn rows_per_unit_must_agree() {
    let rows = |a: u32, b: u32| BTreeMap::from([(agent("a"), a), (agent("b"), b)]);
    assert_eq!(shared_max_rows(&rows(5, 5)), Ok(5));
    let (first, second) = (agent("a"), agent("b"));
    let expected = SharedError::RowsPerUnit { first, second, expected: 5, got: 4 };
    assert_eq!(shared_max_rows(&rows(5, 4)), Err(expected));
    assert_eq!(shared_max_rows(&BTreeMap::new()), Err(SharedError::NoContract));
}
