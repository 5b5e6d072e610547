//! The partition as a picture: one lane a group, nodes together, blocks along it, transfers as arrows.
//!
//! Takes a manifest; gives text for a terminal, dot for Graphviz, or a self-contained SVG that reads
//! on light and dark ground. All three show the same: who computes which block, what crosses after
//! which block and is added in which, and which blocks nobody needs.

use std::fmt::{self, Write as _};

use snn_schemas::Manifest;
use snn_schemas::manifest::Transfer;

use crate::show::{costs, idle, shape, transfer, transfers};

/// What a manifest's lanes are made of.
struct Lanes<'a> {
    manifest: &'a Manifest,
    /// (rank, group), lanes of one node together.
    lanes: Vec<(usize, usize)>,
    /// Transfers that a step asks for, with the lanes and blocks at their ends.
    arrows: Vec<Arrow<'a>>,
}

/// A transfer between two blocks.
struct Arrow<'a> {
    transfer: &'a Transfer,
    from_lane: usize,
    to_lane: usize,
    /// Block (from 0) after which it is sent.
    from_block: usize,
    /// Block (from 0) in which it is added.
    to_block: usize,
}

impl<'a> Lanes<'a> {
    fn new(manifest: &'a Manifest) -> Lanes<'a> {
        let mut lanes: Vec<(usize, usize)> =
            manifest.placement.iter().enumerate().map(|(group, &rank)| (rank, group)).collect();
        lanes.sort();
        let lane = |group: Option<usize>| lanes.iter().position(|lane| Some(lane.1) == group);
        let staleness = manifest.staleness.unwrap_or(1);
        let arrow = |transfer: &'a Transfer| {
            let step = transfer.step?;
            Some(Arrow {
                transfer,
                from_lane: lane(transfer.from_group)?,
                to_lane: lane(transfer.to_group)?,
                from_block: step * staleness,
                to_block: (step + 1) * staleness - 1,
            })
        };
        let arrows = manifest.transfers.iter().filter_map(arrow).collect();
        Lanes { manifest, lanes, arrows }
    }

    /// Whether the group of `lane` computes `block`.
    fn is_live(&self, lane: usize, block: usize) -> bool {
        self.manifest.blocks[block].groups.contains(&self.lanes[lane].1)
    }

    /// Whether some group does not compute some block.
    fn has_dropped(&self) -> bool {
        let count = self.lanes.len();
        self.manifest.blocks.iter().any(|block| block.groups.len() < count)
    }

    /// A header over block `index` where the shape changes: `8×8`.
    fn stage(&self, index: usize) -> Option<String> {
        let extent = |block: usize| &self.manifest.blocks[block].shape[2.min(self.rank(block))..];
        let changed = index == 0 || extent(index) != extent(index - 1);
        let dims: Vec<String> = extent(index).iter().map(usize::to_string).collect();
        changed.then(|| dims.join("×"))
    }

    fn rank(&self, block: usize) -> usize {
        self.manifest.blocks[block].shape.len()
    }
}

/// The picture as text: `■` a block, `·` one nobody needs, `→g1` sent, `←g3` added.
pub fn text(manifest: &Manifest) -> String {
    let mut picture = String::new();
    let _ = write_text(&mut picture, &Lanes::new(manifest));
    picture
}

fn write_text(out: &mut String, lanes: &Lanes<'_>) -> fmt::Result {
    let blocks = lanes.manifest.blocks.len();
    let cells: Vec<Vec<String>> = (0..lanes.lanes.len())
        .map(|lane| (0..blocks).map(|block| cell(lanes, lane, block)).collect())
        .collect();
    let width = |block: usize| {
        let widest = cells.iter().map(|row| row[block].chars().count()).max().unwrap_or(0);
        widest.max(lanes.stage(block).map_or(0, |stage| stage.chars().count())).max(3) + 2
    };
    let mut line = |first: &str, cell: &dyn Fn(usize) -> String| -> fmt::Result {
        let mut row = format!("{first:<8}");
        for block in 0..blocks {
            let wide = width(block);
            let _ = write!(row, "{:<wide$}", cell(block));
        }
        writeln!(out, "{}", row.trim_end())
    };
    line("", &|block| format!("b{}", block + 1))?;
    line("", &|block| lanes.stage(block).unwrap_or_default())?;
    for (lane, (rank, group)) in lanes.lanes.iter().enumerate() {
        line(&format!("n{rank} g{group}"), &|block| cells[lane][block].clone())?;
    }
    let mut legend = vec!["■ computed"];
    legend.extend(lanes.has_dropped().then_some("· dropped: no output needs it"));
    legend.extend((!lanes.arrows.is_empty()).then_some("→ sent to  ← added from"));
    match blocks {
        0 => Ok(()),
        _ => writeln!(out, "{}", legend.join("  ")),
    }
}

fn cell(lanes: &Lanes<'_>, lane: usize, block: usize) -> String {
    if !lanes.is_live(lane, block) {
        return "·".to_owned();
    }
    let mut cell = "■".to_owned();
    for arrow in &lanes.arrows {
        if arrow.to_lane == lane && arrow.to_block == block {
            let _ = write!(cell, "←g{}", lanes.lanes[arrow.from_lane].1);
        }
        if arrow.from_lane == lane && arrow.from_block == block {
            let _ = write!(cell, "→g{}", lanes.lanes[arrow.to_lane].1);
        }
    }
    cell
}

/// The picture for Graphviz.
pub fn dot(manifest: &Manifest) -> String {
    let mut picture = String::new();
    let _ = write_dot(&mut picture, &Lanes::new(manifest));
    picture
}

fn write_dot(out: &mut String, lanes: &Lanes<'_>) -> fmt::Result {
    writeln!(out, "digraph snn {{")?;
    writeln!(out, "  rankdir=LR; node [shape=box, fontname=\"sans-serif\"];")?;
    writeln!(out, "  edge [fontname=\"sans-serif\", fontsize=10];")?;
    let blocks = lanes.manifest.blocks.len();
    for rank in 0..lanes.manifest.nodes.len() {
        writeln!(out, "  subgraph cluster_{rank} {{")?;
        writeln!(out, "    label=\"node {rank}\";")?;
        let mine = lanes.lanes.iter().enumerate().filter(|(_, lane)| lane.0 == rank);
        for (lane, (_, group)) in mine {
            for block in (0..blocks).filter(|&block| lanes.is_live(lane, block)) {
                writeln!(out, "    g{group}_b{0} [label=\"g{group} b{0}\"];", block + 1)?;
            }
            let live =
                |block: &usize| lanes.is_live(lane, *block) && lanes.is_live(lane, block + 1);
            for block in (0..blocks.saturating_sub(1)).filter(live) {
                writeln!(out, "    g{group}_b{} -> g{group}_b{};", block + 1, block + 2)?;
            }
        }
        writeln!(out, "  }}")?;
    }
    for arrow in &lanes.arrows {
        let (from, to) = (lanes.lanes[arrow.from_lane].1, lanes.lanes[arrow.to_lane].1);
        let Transfer { id, dtype, bytes, .. } = arrow.transfer;
        writeln!(
            out,
            "  g{from}_b{} -> g{to}_b{} [color=\"#c2410c\", constraint=false, label=\"t{id} {} B {dtype}\"];",
            arrow.from_block + 1,
            arrow.to_block + 1,
            bytes,
        )?;
    }
    writeln!(out, "}}")
}

/// Geometry of the SVG, in pixels.
const LEFT: usize = 92;
const TOP: usize = 64;
const COLUMN: usize = 74;
const LANE: usize = 64;
const BOX_WIDTH: usize = 42;
const BOX_HEIGHT: usize = 26;
/// How far an arrow keeps its direction at either end.
const BEND: usize = 22;

/// With a ground of its own: a viewer that is bright may still ask for dark colours.
const STYLE: &str = "\
svg{background:#fff}text{font:12px system-ui,sans-serif;fill:#1f2937}.dim{fill:#6b7280;font-size:11px}\
.box{fill:#dbeafe;stroke:#2563eb}.dead{fill:none;stroke:#9ca3af;stroke-dasharray:3 3}\
.lane{fill:#f3f4f6}.trunk{stroke:#2563eb;stroke-width:1.5}\
.arrow{fill:none;stroke:#c2410c;stroke-width:1.5;marker-end:url(#head)}.head{fill:#c2410c}\
@media(prefers-color-scheme:dark){svg{background:#111827}text{fill:#e5e7eb}.dim{fill:#9ca3af}.box{fill:#1e3a5f}\
.lane{fill:#1f2937}.arrow{stroke:#fb923c}.head{fill:#fb923c}}";

/// The picture as one SVG file.
pub fn svg(manifest: &Manifest) -> String {
    let mut picture = String::new();
    let _ = write_svg(&mut picture, &Lanes::new(manifest));
    picture
}

fn write_svg(out: &mut String, lanes: &Lanes<'_>) -> fmt::Result {
    let manifest = lanes.manifest;
    let blocks = manifest.blocks.len();
    let width = (LEFT + blocks * COLUMN + 40).max(520);
    let height = TOP + lanes.lanes.len() * LANE + 44;
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" role=\"img\">"
    )?;
    writeln!(out, "<title>Partition over {} nodes</title>", manifest.nodes.len())?;
    writeln!(out, "<style>{STYLE}</style>")?;
    writeln!(
        out,
        "<defs><marker id=\"head\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"7\" markerHeight=\"7\" orient=\"auto\"><path class=\"head\" d=\"M0 0L8 4L0 8z\"/></marker></defs>"
    )?;
    for block in 0..blocks {
        let x = center(block);
        writeln!(out, "<text x=\"{x}\" y=\"24\" text-anchor=\"middle\">b{}</text>", block + 1)?;
        if let Some(stage) = lanes.stage(block) {
            writeln!(
                out,
                "<text class=\"dim\" x=\"{x}\" y=\"42\" text-anchor=\"middle\">{stage}</text>"
            )?;
        }
    }
    write_lanes(out, lanes, width)?;
    for arrow in &lanes.arrows {
        write_arrow(out, manifest, arrow)?;
    }
    let cost = &manifest.cost;
    writeln!(
        out,
        "<text class=\"dim\" x=\"12\" y=\"{}\">paper cost {:.2} % · wire {} B, {:.2} % of a ring all-reduce{}</text>",
        height - 16,
        cost.paper.fraction * 100.0,
        cost.wire.exchange_bytes,
        cost.wire.fraction * 100.0,
        if lanes.has_dropped() { " · dashed: no output needs it" } else { "" }
    )?;
    writeln!(out, "</svg>")
}

fn center(block: usize) -> usize {
    LEFT + block * COLUMN + COLUMN / 2
}

fn middle(lane: usize) -> usize {
    TOP + lane * LANE + LANE / 2
}

fn write_lanes(out: &mut String, lanes: &Lanes<'_>, width: usize) -> fmt::Result {
    let blocks = lanes.manifest.blocks.len();
    for (lane, (rank, group)) in lanes.lanes.iter().enumerate() {
        let y = middle(lane);
        if rank % 2 == 0 {
            let top = y - LANE / 2;
            writeln!(
                out,
                "<rect class=\"lane\" x=\"0\" y=\"{top}\" width=\"{width}\" height=\"{LANE}\"/>"
            )?;
        }
        writeln!(out, "<text x=\"12\" y=\"{}\">node {rank} · g{group}</text>", y + 4)?;
        for block in 0..blocks {
            let live = lanes.is_live(lane, block);
            if block > 0 && live && lanes.is_live(lane, block - 1) {
                let (from, to) = (center(block - 1) + BOX_WIDTH / 2, center(block) - BOX_WIDTH / 2);
                writeln!(
                    out,
                    "<line class=\"trunk\" x1=\"{from}\" y1=\"{y}\" x2=\"{to}\" y2=\"{y}\"/>"
                )?;
            }
            let (x, top) = (center(block) - BOX_WIDTH / 2, y - BOX_HEIGHT / 2);
            let class = if live { "box" } else { "dead" };
            let entry = &lanes.manifest.blocks[block];
            writeln!(
                out,
                "<rect class=\"{class}\" x=\"{x}\" y=\"{top}\" width=\"{BOX_WIDTH}\" height=\"{BOX_HEIGHT}\" rx=\"4\"><title>{} {}</title></rect>",
                escape(&entry.name),
                shape(&entry.shape)
            )?;
        }
    }
    Ok(())
}

fn write_arrow(out: &mut String, manifest: &Manifest, arrow: &Arrow<'_>) -> fmt::Result {
    // Leaves the right of the sending block and arrives at the left of the receiving one, upright.
    let down = arrow.to_lane > arrow.from_lane;
    let edge = |lane: usize, below: bool| match below {
        true => middle(lane) + BOX_HEIGHT / 2,
        false => middle(lane) - BOX_HEIGHT / 2,
    };
    let (x1, y1) = (center(arrow.from_block) + BOX_WIDTH / 4, edge(arrow.from_lane, down));
    let (x2, y2) = (center(arrow.to_block) - BOX_WIDTH / 4, edge(arrow.to_lane, !down));
    let (leave, arrive) = match down {
        true => (y1 + BEND, y2 - BEND),
        false => (y1 - BEND, y2 + BEND),
    };
    let title = transfer(manifest, arrow.transfer);
    writeln!(
        out,
        "<path class=\"arrow\" d=\"M{x1} {y1}C{x1} {leave} {x2} {arrive} {x2} {y2}\"><title>{}</title></path>",
        escape(&title)
    )
}

/// Text for use inside XML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The picture as text, with the transfers and both costs below it.
pub fn page(manifest: &Manifest) -> String {
    let mut page = text(manifest);
    let list = transfers(manifest);
    if !list.is_empty() {
        page.push('\n');
        page.push_str(&list);
    }
    page.push('\n');
    page.push_str(&costs(manifest));
    page.push_str(&idle(manifest));
    page
}
