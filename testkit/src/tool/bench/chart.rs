//! The picture: seconds over connections, both on logarithmic axes.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use soccr_testkit::{Lock, Place};

use super::case::{Case, Party, Storage};
use super::row::Row;

const SIZE: (u32, u32) = (1100, 480);

/// Frozen and restore time of every party, images in memory, queues empty.
pub fn of(rows: &[Row<Case>]) -> Result<String> {
    let mut svg = String::new();
    draw(rows, &mut svg).map_err(|error| anyhow!("cannot draw: {error}"))?;
    Ok(svg)
}

type Drawn<T> = Result<T, Box<dyn std::error::Error>>;

fn draw(rows: &[Row<Case>], svg: &mut String) -> Drawn<()> {
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(SIZE.0 / 2);
    panel(&left, "Seconds frozen", rows, Row::frozen)?;
    panel(&right, "Seconds to restore", rows, Row::restore)?;
    area.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn panel(area: &Area<'_>, title: &str, rows: &[Row<Case>], of: fn(&Row<Case>) -> Option<f64>) -> Drawn<()> {
    let parties = [Lock::Iptables, Lock::Nftables, Lock::Skip].map(Party::Stock);
    let lines =
        parties.into_iter().chain([Party::Ours, Party::Floor]).map(|party| (party, line(rows, party, of)));
    let lines: Vec<_> = lines.filter(|(_, line)| !line.is_empty()).collect();
    let points = || lines.iter().flat_map(|(_, line)| line);
    let most = |of: fn(&(f64, f64)) -> f64| points().map(of).fold(f64::MIN_POSITIVE, f64::max);
    let least = points().map(|point| point.1).fold(f64::INFINITY, f64::min).min(1.0);
    let (x, y) =
        (0.8..most(|point| point.0).max(1.0) * 1.5, least * 0.7..most(|point| point.1).max(least) * 1.5);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(x.log_scale(), y.log_scale())?;
    chart.configure_mesh().x_desc("connections").light_line_style(WHITE).draw()?;
    for (party, points) in lines {
        let colour = colour(party);
        let drawn = chart.draw_series(LineSeries::new(points, colour.stroke_width(2)).point_size(3))?;
        drawn.label(party.to_string()).legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
    }
    chart.configure_series_labels().position(SeriesLabelPosition::UpperLeft).border_style(BLACK).draw()?;
    Ok(())
}

fn line(rows: &[Row<Case>], party: Party, of: fn(&Row<Case>) -> Option<f64>) -> Vec<(f64, f64)> {
    let plain = |row: &&Row<Case>| {
        let case = row.case;
        row.party == party
            && case.queued == 0
            && case.place == Place::Host
            && case.storage == Storage::Tmpfs
            && !case.verbose
    };
    let points = rows.iter().filter(plain).filter_map(|row| Some((row.connections(), of(row)?)));
    let mut points: Vec<_> = points.collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points
}

fn colour(party: Party) -> RGBColor {
    match party {
        Party::Floor => RGBColor(150, 150, 150),
        Party::Ours => RGBColor(31, 78, 121),
        Party::Stock(Lock::Skip) => RGBColor(230, 145, 56),
        Party::Stock(Lock::Nftables) => RGBColor(106, 168, 79),
        Party::Stock(Lock::Iptables) => RGBColor(176, 58, 46),
    }
}
