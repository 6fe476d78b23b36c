//! The budget-over-time picture: inline SVG, no fonts or files loaded.

use super::{EventKind, ProductSection, ReportError};
use crate::accountant::zcdp;
use crate::budget::Rho;
use plotters::prelude::*;

/// Draws ε spent over time as steps, with the granted ε as a line.
pub(super) fn budget_over_time(section: &ProductSection) -> Result<String, ReportError> {
    let points = steps(section);
    let granted = section.granted.epsilon.get();
    let start = section.events.first().map_or(0, |line| line.time_ms);
    let end = section.events.last().map_or(start, |line| line.time_ms);
    let (unit_ms, unit) = time_unit(end - start);
    let last = ((end - start) as f64 / unit_ms).max(1.0);
    let mut svg = String::new();
    draw(&mut svg, &points, granted, (unit_ms, unit), last).map_err(|reason| ReportError::Page { reason })?;
    Ok(svg)
}

type Point = (f64, f64);

fn draw(
    svg: &mut String,
    points: &[Point],
    granted: f64,
    time: (f64, &str),
    last: f64,
) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let top = points.iter().map(|p| p.1).fold(granted, f64::max) * 1.1;
    let mut chart = ChartBuilder::on(&root)
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(46)
        .build_cartesian_2d(0.0..last, 0.0..top)
        .map_err(|e| text(&e))?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_desc(format!("{} since the first entry", time.1))
        .y_desc("epsilon")
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(|e| text(&e))?;
    let scaled: Vec<Point> = points.iter().map(|(ms, epsilon)| (ms / time.0, *epsilon)).collect();
    // A stair: each point is reached at the height of the one before.
    let mut stair = vec![(0.0, 0.0)];
    for point in &scaled {
        let height = stair.last().map_or(0.0, |p: &Point| p.1);
        stair.extend([(point.0, height), *point]);
    }
    stair.push((last, stair.last().map_or(0.0, |p| p.1)));
    let spent = RGBColor(31, 90, 150);
    chart.draw_series(AreaSeries::new(stair.iter().copied(), 0.0, spent.mix(0.15))).map_err(|e| text(&e))?;
    chart.draw_series(LineSeries::new(stair.iter().copied(), spent.stroke_width(2))).map_err(|e| text(&e))?;
    let limit = RGBColor(170, 40, 40);
    chart
        .draw_series(LineSeries::new([(0.0, granted), (last, granted)], limit.stroke_width(1)))
        .map_err(|e| text(&e))?;
    root.present().map_err(|e| text(&e))
}

// (milliseconds since the first entry, ε spent from then on).
fn steps(section: &ProductSection) -> Vec<Point> {
    let start = section.events.first().map_or(0, |line| line.time_ms);
    let mut spent = Rho::ZERO;
    let mut latest = 0.0f64;
    let mut points = Vec::new();
    for line in section.events.iter().filter(|line| line.kind == EventKind::Commit) {
        spent = spent.checked_add(line.rho).unwrap_or(spent);
        // A clock set back must not draw the line backwards.
        latest = latest.max((line.time_ms - start) as f64);
        points.push((latest, zcdp::epsilon(spent, section.granted.delta).get()));
    }
    points
}

fn time_unit(span_ms: i64) -> (f64, &'static str) {
    match span_ms {
        ..=120_000 => (1e3, "seconds"),
        120_001..=7_200_000 => (6e4, "minutes"),
        7_200_001..=172_800_000 => (3.6e6, "hours"),
        _ => (8.64e7, "days"),
    }
}

const SIZE: (u32, u32) = (640, 220);
