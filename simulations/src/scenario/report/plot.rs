//! Pictures as inline SVG: axes with round ticks, lines, points, bars, a legend.

use std::fmt::Write;

/// A named run of points.
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// A picture's frame.
pub(super) struct Axes<'a> {
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    pub(super) x_range: (f64, f64),
    pub(super) y_range: (f64, f64),
}

impl<'a> Axes<'a> {
    /// A frame around all points, with a little room.
    pub(super) fn around(x: &'a str, y: &'a str, points: impl Iterator<Item = (f64, f64)> + Clone) -> Self {
        let span = |values: &mut dyn Iterator<Item = f64>, room: f64| {
            let (low, high) =
                values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
            if low > high {
                return (0.0, 1.0);
            }
            let room = if high > low { (high - low) * room } else { 0.5 * high.abs().max(0.1) };
            (low - room, high + room)
        };
        let x_range = span(&mut points.clone().map(|p| p.0), 0.03);
        let y_range = span(&mut points.map(|p| p.1), 0.08);
        Self { x, y, x_range, y_range }
    }

    fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let share = |v: f64, (low, high): (f64, f64)| (v - low) / (high - low);
        let x = LEFT + share(x, self.x_range) * (WIDTH - LEFT - RIGHT);
        let y = HEIGHT - BOTTOM - share(y, self.y_range) * (HEIGHT - TOP - BOTTOM);
        (x, y)
    }

    fn open(&self, title: &str) -> String {
        let mut svg = String::new();
        let _ = write!(
            svg,
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
            escape(title)
        );
        let (right, low) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        for tick in ticks(self.y_range) {
            let (_, y) = self.place((self.x_range.0, tick));
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 6.0,
                y + 4.0,
                number(tick)
            );
        }
        for tick in ticks(self.x_range) {
            let (x, _) = self.place((tick, self.y_range.0));
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{low}\"/>\
                 <text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                low + 16.0,
                number(tick)
            );
        }
        let _ = write!(
            svg,
            "<text class=\"axis\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text class=\"axis\" transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            0.5 * (LEFT + right),
            HEIGHT - 6.0,
            escape(self.x),
            0.5 * (TOP + low),
            escape(self.y),
        );
        svg
    }
}

/// Lines with a dot at every point.
pub(super) fn lines(title: &str, axes: &Axes<'_>, series: &[Series]) -> String {
    let mut svg = axes.open(title);
    paths(&mut svg, axes, series);
    close(svg, series, |_| true)
}

/// A line with its dots for each series.
fn paths(svg: &mut String, axes: &Axes<'_>, series: &[Series]) {
    for (i, line) in series.iter().enumerate() {
        let colour = colour(i);
        let path: Vec<String> = line
            .points
            .iter()
            .map(|point| {
                let (x, y) = axes.place(*point);
                format!("{x:.1},{y:.1}")
            })
            .collect();
        let _ = write!(
            svg,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>",
            path.join(" ")
        );
        dots(svg, axes, line, colour, 2.5);
    }
}

/// Points; those of `level` are drawn as lines across the picture.
pub(super) fn scatter(title: &str, axes: &Axes<'_>, series: &[Series], level: &[Series]) -> String {
    let mut svg = axes.open(title);
    for (i, line) in level.iter().enumerate() {
        let colour = colour(series.len() + i);
        for (_, height) in &line.points {
            let (_, y) = axes.place((axes.x_range.0, *height));
            let _ = write!(
                svg,
                "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"{colour}\" \
                 stroke-width=\"1.5\" stroke-dasharray=\"6 4\"/>",
                WIDTH - RIGHT
            );
        }
    }
    for (i, points) in series.iter().enumerate() {
        dots(&mut svg, axes, points, colour(i), 5.0);
    }
    let all: Vec<Series> =
        series.iter().chain(level).map(|s| Series { name: s.name.clone(), points: Vec::new() }).collect();
    let points = series.len();
    close(svg, &all, move |i| i < points)
}

/// The diagonal of a reliability picture under its lines.
pub(super) fn reliability(title: &str, series: &[Series]) -> String {
    let axes =
        Axes { x: "predicted probability", y: "observed share", x_range: (0.0, 1.0), y_range: (0.0, 1.0) };
    let mut svg = axes.open(title);
    let ((x1, y1), (x2, y2)) = (axes.place((0.0, 0.0)), axes.place((1.0, 1.0)));
    let _ =
        write!(svg, "<line class=\"ideal\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>");
    paths(&mut svg, &axes, series);
    close(svg, series, |_| true)
}

/// Horizontal bars in groups: one group a domain, one bar a method. `range` is what a bar's length spans.
pub(super) fn bars(
    title: &str,
    groups: &[(String, Vec<Option<f64>>)],
    names: &[String],
    range: (f64, f64),
) -> String {
    let (bar, gap) = (9.0, 10.0);
    let group = names.len() as f64 * bar + gap;
    let (left, right, top, bottom) = (170.0, 60.0, 8.0, 26.0);
    let height = top + groups.len() as f64 * group + bottom;
    let x_of =
        |v: f64| left + (v.clamp(range.0, range.1) - range.0) / (range.1 - range.0) * (WIDTH - left - right);
    let mut svg = String::new();
    let _ = write!(
        svg,
        "<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{}\">",
        escape(title)
    );
    for tick in ticks(range) {
        let x = x_of(tick);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{:.1}\"/>\
             <text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            height - bottom,
            height - bottom + 16.0,
            number(tick)
        );
    }
    for (i, (domain, values)) in groups.iter().enumerate() {
        let y = top + i as f64 * group + gap / 2.0;
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            left - 8.0,
            y + (group - gap) / 2.0 + 4.0,
            escape(&shortened(domain))
        );
        for (j, value) in values.iter().enumerate() {
            let Some(value) = value else { continue };
            let y = y + j as f64 * bar;
            let _ = write!(
                svg,
                "<rect x=\"{left}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"><title>{}: {value:.3}</title></rect>",
                y + 0.5,
                x_of(*value) - left,
                bar - 1.0,
                colour(j),
                escape(names.get(j).map_or("", String::as_str))
            );
        }
    }
    let series: Vec<Series> =
        names.iter().map(|name| Series { name: name.clone(), points: Vec::new() }).collect();
    close(svg, &series, |_| true)
}

fn dots(svg: &mut String, axes: &Axes<'_>, series: &Series, colour: &str, radius: f64) {
    for point in &series.points {
        let (x, y) = axes.place(*point);
        let _ = write!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{colour}\"><title>{}: {}, {}</title></circle>",
            escape(&series.name),
            number(point.0),
            number(point.1)
        );
    }
}

/// Ends a picture with its legend beneath; `solid` says which names have dots and not dashes.
fn close(mut svg: String, series: &[Series], solid: impl Fn(usize) -> bool) -> String {
    svg.push_str("</svg><ul class=\"legend\">");
    for (i, line) in series.iter().enumerate() {
        let class = if solid(i) { "dot" } else { "dash" };
        let _ = write!(
            svg,
            "<li><span class=\"{class}\" style=\"--c:{}\"></span>{}</li>",
            colour(i),
            escape(&line.name)
        );
    }
    svg.push_str("</ul>");
    svg
}

/// Four to eight round numbers within a range.
fn ticks((low, high): (f64, f64)) -> Vec<f64> {
    let span = high - low;
    if span.is_nan() || span <= 0.0 {
        return Vec::new();
    }
    let raw = span / 5.0;
    let power = 10_f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|f| f * power).find(|s| *s >= raw).unwrap_or(raw);
    let first = (low / step).ceil();
    (0..20).map(|i| (first + f64::from(i)) * step).take_while(|t| *t <= high + step * 1e-9).collect()
}

/// A figure with at most three decimals and none that are zero.
pub(super) fn number(value: f64) -> String {
    let text = if value.abs() >= 1e5 { format!("{value:.0}") } else { format!("{value:.3}") };
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

/// Text inside the page.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn shortened(name: &str) -> String {
    if name.chars().count() <= LONGEST_NAME {
        return name.to_owned();
    }
    name.chars().take(LONGEST_NAME - 1).chain(['…']).collect()
}

/// The eight colours of Okabe and Ito, told apart by most eyes, then again.
fn colour(i: usize) -> &'static str {
    COLOURS.get(i % COLOURS.len()).copied().unwrap_or("#000")
}

const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7a00", "#5b5b5b"];
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 44.0;
const LONGEST_NAME: usize = 24;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within() {
        let shown = |range| ticks(range).into_iter().map(number).collect::<Vec<_>>();
        assert_eq!(shown((0.0, 1.0)), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(shown((0.71, 0.742)), ["0.71", "0.72", "0.73", "0.74"]);
        assert_eq!(shown((1.0, 20.0)), ["5", "10", "15", "20"]);
        assert!(ticks((1.0, 1.0)).is_empty() && ticks((f64::NAN, 1.0)).is_empty());
    }

    #[test]
    fn names_can_not_break_the_page() {
        let series = Series { name: "<script>\"&".into(), points: vec![(0.0, 0.5), (1.0, 0.6)] };
        let axes = Axes::around("x", "y", series.points.clone().into_iter());
        let svg = lines("t", &axes, &[series]);
        assert!(!svg.contains("<script>") && svg.contains("&lt;script&gt;&quot;&amp;"), "{svg}");
        assert!(svg.starts_with("<svg") && svg.ends_with("</ul>") && !svg.contains("NaN"));
    }

    fn series(name: &str, points: &[(f64, f64)]) -> Series {
        Series { name: name.into(), points: points.to_vec() }
    }

    #[test]
    fn lines_and_points_stand_where_their_figures_say() {
        let axes = Axes { x: "x", y: "y", x_range: (0.0, 1.0), y_range: (0.0, 1.0) };
        let both = [series("a", &[(0.0, 0.0), (0.5, 0.5)]), series("b", &[(1.0, 1.0)])];
        // The frame is 564 by 266, from (62, 276) to the right and up.
        let svg = lines("t", &axes, &both);
        assert_eq!((svg.matches("<polyline").count(), svg.matches("<circle").count()), (2, 3));
        assert!(
            svg.contains("points=\"62.0,276.0 344.0,143.0\"") && svg.contains("points=\"626.0,10.0\""),
            "{svg}"
        );

        let svg = scatter("t", &axes, &both, &[series("level", &[(0.0, 0.5)])]);
        assert_eq!((svg.matches("<circle").count(), svg.matches("stroke-dasharray").count()), (3, 1));
        assert!(
            svg.contains("cx=\"344.0\" cy=\"143.0\"") && svg.contains("y1=\"143.0\" y2=\"143.0\" stroke="),
            "{svg}"
        );

        let svg = reliability("t", &both);
        assert!(svg.contains("class=\"ideal\" x1=\"62.0\" y1=\"276.0\" x2=\"626.0\" y2=\"10.0\""), "{svg}");
        assert_eq!((svg.matches("<polyline").count(), svg.matches("<circle").count()), (2, 3));
    }

    #[test]
    fn bars_are_as_long_as_their_figures_and_missing_ones_are_left_out() {
        let groups =
            [("north".to_owned(), vec![Some(0.75), Some(1.0)]), ("south".to_owned(), vec![None, Some(0.5)])];
        let svg = bars("t", &groups, &["a".to_owned(), "b".to_owned()], (0.5, 1.0));
        let widths: Vec<&str> = svg
            .split("<rect ")
            .skip(1)
            .filter_map(|rect| rect.split("width=\"").nth(1)?.split('"').next())
            .collect();
        assert_eq!(widths, ["205.0", "410.0", "0.0"]);
        assert!(svg.contains("north") && svg.contains("south"));
    }
}
