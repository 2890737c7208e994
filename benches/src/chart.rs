//! Groups of bars, as SVG.

use std::fmt::Write;

/// What the bars of one colour stand for.
#[derive(Clone, Copy, Debug)]
pub struct Series<'a> {
    /// What it is called.
    pub name: &'a str,
    /// Its colour, as CSS has it.
    pub colour: &'a str,
}

/// One bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Which series it is of.
    pub series: usize,
    /// How long it is, in the unit of all.
    pub value: f64,
    /// How far a thin line goes on from there, to what was the most, say.
    pub reaches: Option<f64>,
    /// What stands behind it.
    pub text: String,
}

/// Bars that are to be compared.
#[derive(Clone, Debug)]
pub struct Group {
    /// What stands before them.
    pub label: String,
    /// From top to bottom.
    pub bars: Vec<Bar>,
}

const BAR: f64 = 12.0;
const WIDTH: f64 = 780.0;
/// Room for labels.
const LEFT: f64 = 190.0;
/// Room for what stands behind a bar.
const RIGHT: f64 = 150.0;
const TOP: f64 = 40.0;

/// A drawing of all groups below each other, with a legend, in one scale.
#[must_use]
pub fn bars(series: &[Series<'_>], groups: &[Group]) -> String {
    let most = groups
        .iter()
        .flat_map(|group| &group.bars)
        .map(|bar| bar.reaches.map_or(bar.value, |end| end.max(bar.value)))
        .fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - LEFT - RIGHT) / most;
    let mut drawn = String::new();
    // Writing to a string cannot fail.
    for (index, series) in series.iter().enumerate() {
        let x = LEFT + 140.0 * index as f64;
        let Series { name, colour } = series;
        let _ = writeln!(
            drawn,
            r#"<rect x="{x}" y="10" width="12" height="12" fill="{colour}"/>"#
        );
        let _ = writeln!(
            drawn,
            r#"<text x="{}" y="20">{}</text>"#,
            x + 16.0,
            escaped(name)
        );
    }
    let mut y = TOP;
    for group in groups {
        let middle = y + group.bars.len() as f64 * BAR / 2.0 + 4.0;
        let label = escaped(&group.label);
        let _ = writeln!(drawn, r#"<text x="4" y="{middle}">{label}</text>"#);
        for bar in &group.bars {
            let colour = series
                .get(bar.series)
                .map_or("black", |series| series.colour);
            let width = bar.value * scale;
            let _ = writeln!(
                drawn,
                r#"<rect x="{LEFT}" y="{y}" width="{width:.1}" height="{}" fill="{colour}"/>"#,
                BAR - 1.0
            );
            let mut end = LEFT + width;
            if let Some(reaches) = bar.reaches {
                let to = LEFT + reaches * scale;
                let at = y + BAR / 2.0;
                let _ = writeln!(
                    drawn,
                    r#"<line x1="{end:.1}" y1="{at}" x2="{to:.1}" y2="{at}" stroke="{colour}"/>"#
                );
                end = end.max(to);
            }
            let _ = writeln!(
                drawn,
                r#"<text x="{:.1}" y="{}">{}</text>"#,
                end + 4.0,
                y + BAR - 2.0,
                escaped(&bar.text)
            );
            y += BAR;
        }
        y += BAR;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" \
         font-family=\"sans-serif\" font-size=\"10\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{drawn}</svg>\n"
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_is_drawn_in_one_scale_with_its_text() {
        let bar = |series, value, reaches| Bar {
            series,
            value,
            reaches,
            text: format!("{value} <ms>"),
        };
        let groups = [Group {
            label: "a & b".to_owned(),
            bars: vec![bar(0, 1.0, None), bar(1, 2.0, Some(4.0))],
        }];
        let series = [("one", "red"), ("two", "blue")];
        let series = series.map(|(name, colour)| Series { name, colour });
        let drawing = bars(&series, &groups);
        // 440 wide for 4.
        assert!(
            drawing.contains(r#"width="110.0" height="11" fill="red""#),
            "{drawing}"
        );
        assert!(
            drawing.contains(r#"width="220.0" height="11" fill="blue""#),
            "{drawing}"
        );
        assert!(
            drawing.contains(r#"x1="410.0" y1="58" x2="630.0""#),
            "{drawing}"
        );
        for text in ["a &amp; b", "1 &lt;ms>", ">two<"] {
            assert!(drawing.contains(text), "{text}");
        }
    }
}
