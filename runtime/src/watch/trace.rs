//! The lanes of several nodes as one trace, in the JSON that Perfetto and Chrome read.
//!
//! Takes [`Lane`]s with the offset of each node's clock; gives one document with a lane a node: its
//! segments, what it decodes and its waits; beside it what it encodes meanwhile, an arrow from each send
//! to its receive, and each request above them. [`hidden`] gives the share of transfer time during which the receiver computed: from the
//! moment a frame leaves until it has arrived. Only segments count as computing, and only transfers
//! of which both ends were recorded.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::recorder::{Kind, Lane, Span};

/// A lane on the common time axis.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Aligned {
    /// What the node recorded.
    pub lane: Lane,
    /// What is to be added to the node's times, in ns.
    pub offset: i64,
    /// How far the offset may be off, in ns.
    pub uncertainty: u64,
}

impl Aligned {
    fn at(&self, time: u64) -> i64 {
        i64::try_from(time).unwrap_or(i64::MAX).saturating_add(self.offset)
    }

    fn of(&self, kind: Kind) -> impl Iterator<Item = &Span> {
        self.lane.spans.iter().filter(move |span| span.kind == kind)
    }
}

/// How much of the transfers' time was hidden behind computing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Hidden {
    /// Transfers of which both ends were recorded.
    pub transfers: usize,
    /// Their time, from leaving to arriving, in ms.
    pub total_ms: f64,
    /// The part of it in which the receiver computed, in ms.
    pub hidden_ms: f64,
}

impl Hidden {
    /// The share hidden, 0 to 1; `None` where nothing was sent.
    pub fn share(&self) -> Option<f64> {
        (self.total_ms > 0.0).then(|| self.hidden_ms / self.total_ms)
    }
}

/// One frame's way: when it left and when it arrived, in ns on the common axis.
struct Journey<'a> {
    receiver: &'a Aligned,
    left: i64,
    arrived: i64,
}

fn journeys(lanes: &[Aligned]) -> Vec<Journey<'_>> {
    let mut left = HashMap::new();
    for lane in lanes {
        left.extend(lane.of(Kind::Encode).map(|span| ((span.request, span.id), lane.at(span.end))));
    }
    let arrivals =
        lanes.iter().flat_map(|lane| lane.of(Kind::Arrived).map(move |span| (lane, span)));
    let journey = |(receiver, span): (_, &Span)| {
        let &left = left.get(&(span.request, span.id))?;
        let receiver: &Aligned = receiver;
        // Clocks are never aligned perfectly; nothing arrives before it has left.
        Some(Journey { receiver, left, arrived: receiver.at(span.start).max(left) })
    };
    arrivals.filter_map(journey).collect()
}

/// How much of the transfers' time was hidden behind computing.
pub fn hidden(lanes: &[Aligned]) -> Hidden {
    let busy: HashMap<usize, Vec<(i64, i64)>> = lanes
        .iter()
        .map(|lane| {
            // One thread computes, so these follow each other.
            let spans = lane.of(Kind::Compute).map(|span| (lane.at(span.start), lane.at(span.end)));
            (lane.lane.rank, spans.collect())
        })
        .collect();
    let mut sum = Hidden::default();
    for Journey { receiver, left, arrived } in journeys(lanes) {
        let spans = busy.get(&receiver.lane.rank).map_or(&[][..], Vec::as_slice);
        let first = spans.partition_point(|&(_, end)| end <= left);
        let overlap = |&(start, end): &(i64, i64)| end.min(arrived) - start.max(left);
        let during = spans[first..].iter().take_while(|&&(start, _)| start < arrived);
        sum.transfers += 1;
        sum.total_ms += (arrived - left) as f64 / 1e6;
        sum.hidden_ms += during.map(overlap).sum::<i64>() as f64 / 1e6;
    }
    sum
}

/// The trace as a JSON document.
pub fn document(lanes: &[Aligned]) -> Value {
    let zero = lanes
        .iter()
        .flat_map(|lane| lane.lane.spans.iter().map(|span| lane.at(span.start)))
        .min()
        .unwrap_or(0);
    let hidden = hidden(lanes);
    let mut events = vec![named("process_name", 0, "cluster")];
    for lane in lanes {
        let rank = lane.lane.rank;
        events.push(named("thread_name", rank, &format!("node {rank}")));
        events.push(sorted(rank, rank * BESIDE));
        let mut beside = Beside::default();
        for span in &lane.lane.spans {
            let place = (span.kind == Kind::Encode).then(|| beside.place(span));
            let track = place.map_or(rank, |place| SENDS + rank * BESIDE + place);
            events.extend(shown(lane, span, zero, track));
        }
        for place in 0..beside.busy_until.len() {
            let track = SENDS + rank * BESIDE + place;
            events.push(named("thread_name", track, &format!("node {rank} sends")));
            events.push(sorted(track, rank * BESIDE + 1 + place));
        }
    }
    let uncertainty = lanes.iter().map(|lane| lane.uncertainty).max().unwrap_or(0);
    let dropped: u64 = lanes.iter().map(|lane| lane.lane.dropped).sum();
    json!({
        "displayTimeUnit": "ms",
        "otherData": {
            "transfers": hidden.transfers,
            "transfer_ms": hidden.total_ms,
            "hidden_ms": hidden.hidden_ms,
            "hidden_share": hidden.share(),
            "clocks_within_us": uncertainty as f64 / 1e3,
            "spans_dropped": dropped,
        },
        "traceEvents": events,
    })
}

/// Number of the first track beside the nodes' own; each node has room for so many.
const SENDS: usize = 1 << 20;
const BESIDE: usize = 1 << 10;

/// Tracks beside a node's own, for what it does on several threads: spans of one track do not overlap.
#[derive(Default)]
struct Beside {
    busy_until: Vec<u64>,
}

impl Beside {
    /// The first track that is free for a span; spans come in the order in which they end.
    fn place(&mut self, span: &Span) -> usize {
        let free = self.busy_until.iter().position(|&until| until <= span.start);
        let place = free.unwrap_or(self.busy_until.len()).min(BESIDE - 2);
        if place == self.busy_until.len() {
            self.busy_until.push(0);
        }
        self.busy_until[place] = span.end;
        place
    }
}

fn sorted(track: usize, index: usize) -> Value {
    json!({ "ph": "M", "name": "thread_sort_index", "pid": 0, "tid": track,
            "args": { "sort_index": index } })
}

fn named(what: &str, lane: usize, name: &str) -> Value {
    json!({ "ph": "M", "name": what, "pid": 0, "tid": lane, "args": { "name": name } })
}

fn shown(lane: &Aligned, span: &Span, zero: i64, track: usize) -> Vec<Value> {
    let time = |ns: u64| (lane.at(ns) - zero) as f64 / 1e3;
    let (start, end) = (time(span.start), time(span.end));
    // Larger than what a reader's floating-point numbers hold, so as text.
    let request = format!("{:016x}", span.request);
    let on_lane = |category: &str, name: String| {
        json!({ "ph": "X", "cat": category, "name": name, "pid": 0, "tid": track, "ts": start,
                "dur": end - start, "args": { "request": request } })
    };
    let arrow = |phase: &str| {
        let id = format!("{request}.{}", span.id);
        json!({ "ph": phase, "cat": "transfer", "name": format!("t{}", span.id), "id": id,
                "pid": 0, "tid": track, "ts": (start + end) / 2.0, "bp": "e" })
    };
    let id = span.id;
    match span.kind {
        Kind::Compute => vec![on_lane("compute", format!("segment {id}"))],
        Kind::Encode => vec![on_lane("codec", format!("send t{id}")), arrow("s")],
        Kind::Decode => vec![on_lane("codec", format!("receive t{id}")), arrow("f")],
        Kind::Wait => vec![on_lane("wait", format!("wait t{id}"))],
        Kind::Arrived => vec![json!({
            "ph": "i", "s": "t", "cat": "arrival", "name": format!("t{id} arrives"),
            "pid": 0, "tid": track, "ts": start, "args": { "request": request },
        })],
        Kind::Request => {
            let edge = |phase: &str, ts: f64| {
                json!({ "ph": phase, "cat": "request", "name": "request", "id": request,
                        "pid": 0, "tid": track, "ts": ts })
            };
            vec![edge("b", start), edge("e", end)]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(kind: Kind, id: u32, start: u64, end: u64) -> Span {
        Span { kind, id, request: 1, start: start * 1_000_000, end: end * 1_000_000 }
    }

    fn lane(rank: usize, offset_ms: i64, spans: Vec<Span>) -> Aligned {
        let lane = Lane { rank, spans, ..Lane::default() };
        Aligned { lane, offset: offset_ms * 1_000_000, uncertainty: 5_000 }
    }

    /// Rank 0 sends at 10; rank 1, whose clock is 100 behind, computes from 8 to 13 and gets it at 14.
    fn two() -> [Aligned; 2] {
        let sender = lane(0, 0, vec![span(Kind::Encode, 4, 9, 10)]);
        let receiver = lane(
            1,
            -100,
            vec![
                span(Kind::Compute, 0, 108, 113),
                span(Kind::Arrived, 4, 114, 114),
                span(Kind::Wait, 4, 113, 114),
                span(Kind::Decode, 4, 114, 115),
            ],
        );
        [sender, receiver]
    }

    #[test]
    fn a_transfer_is_hidden_while_its_receiver_computes() {
        let hidden = hidden(&two());
        assert_eq!(hidden, Hidden { transfers: 1, total_ms: 4.0, hidden_ms: 3.0 });
        assert_eq!(hidden.share(), Some(0.75));
        assert_eq!(super::hidden(&two()[..1]).share(), None);
    }

    #[test]
    fn computing_outside_of_the_journey_hides_nothing() {
        let [sender, mut receiver] = two();
        receiver.lane.spans[0] = span(Kind::Compute, 0, 100, 110);
        receiver.lane.spans.push(span(Kind::Compute, 1, 114, 120));
        assert_eq!(super::hidden(&[sender, receiver]).hidden_ms, 0.0);
    }

    #[test]
    fn clocks_that_disagree_make_no_negative_time() {
        let [sender, mut receiver] = two();
        receiver.offset -= 50_000_000;
        assert_eq!(super::hidden(&[sender, receiver]).total_ms, 0.0);
    }

    #[test]
    fn what_is_encoded_at_once_lies_side_by_side() {
        let encodes = [(1, 10, 20), (2, 12, 22), (3, 20, 30), (4, 11, 31)];
        let spans = encodes.map(|(id, start, end)| span(Kind::Encode, id, start, end));
        let document = document(&[lane(1, 0, spans.to_vec())]);
        let events = document["traceEvents"].as_array().unwrap();
        let track = |name: &str| {
            let sent = events.iter().find(|e| e["ph"] == "X" && e["name"] == name);
            sent.unwrap()["tid"].as_u64().unwrap()
        };
        let [one, two, three, four] = ["send t1", "send t2", "send t3", "send t4"].map(track);
        assert!(one == three && one != two && four != two && four != one && one != 1);
    }

    #[test]
    fn the_document_has_a_lane_a_node_and_an_arrow_a_transfer_on_one_axis() {
        let document = document(&two());
        let events = document["traceEvents"].as_array().unwrap();
        let find = |phase: &str, name: &str| {
            let found = events.iter().find(|e| e["ph"] == phase && e["name"] == name);
            found.unwrap_or_else(|| panic!("{phase} {name}")).clone()
        };
        assert_eq!(find("M", "thread_name")["args"]["name"], "node 0");
        // The earliest span begins the axis: rank 1 computes from 8 on.
        assert_eq!(
            (find("X", "segment 0")["ts"].as_f64(), find("X", "segment 0")["dur"].as_f64()),
            (Some(0.0), Some(5000.0))
        );
        assert_eq!(find("X", "send t4")["ts"].as_f64(), Some(1000.0));
        assert_eq!(find("X", "send t4")["tid"], find("s", "t4")["tid"]);
        assert_eq!(find("X", "wait t4")["tid"], 1);
        assert_eq!(find("s", "t4")["id"], find("f", "t4")["id"]);
        assert_eq!(document["otherData"]["hidden_share"], 0.75);
        assert_eq!(document["otherData"]["clocks_within_us"], 5.0);
    }
}
