//! What a node counts, in the text that Prometheus reads.
//!
//! Takes what a process knows of itself ([`Own`]) and what its HTTP side has answered; gives the page
//! of `/metrics` in OpenMetrics' text format. Each process tells of the ranks it computes, mostly one:
//! Prometheus adds up. Names and units follow its conventions: seconds, bytes, `_total` for what
//! only grows.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::histogram::{BOUNDS_MS, Histogram};
use crate::http::Own;
use crate::node::NodeReport;

/// Media type of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What a node's HTTP side has answered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HttpReport {
    /// Answers by endpoint and status code.
    pub answers: Vec<(&'static str, u16, u64)>,
    /// How long inference requests took, the queue included.
    pub latency: Histogram,
    /// Requests being answered.
    pub running: usize,
    /// Requests that wait for their turn.
    pub queued: usize,
}

/// Everything that one page shows.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Nodes of the cluster.
    pub nodes: usize,
    /// What the process knows of itself.
    pub own: Own,
    /// Its HTTP side.
    pub http: HttpReport,
}

impl Page {
    /// The text.
    pub fn text(self) -> String {
        let mut registry = Registry::with_prefix("snn");
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        match encode(&mut text, &registry) {
            Ok(()) => text,
            // Writing to a String cannot fail; a comment is a valid page all the same.
            Err(error) => format!("# {error}\n# EOF\n"),
        }
    }

    fn cluster(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let missing = self.own.missing.len();
        let present = self.nodes.saturating_sub(missing + 1);
        gauge(out, "peers_present", "Other ranks that somebody computes", present as i64)?;
        gauge(out, "peers_missing", "Ranks that nobody computes", missing as i64)?;
        let help = "Ranks this process has taken over";
        let takeovers = ConstCounter::new(self.own.takeovers);
        takeovers.encode(out.encode_descriptor("takeovers", help, None, MetricType::Counter)?)
    }

    fn ranks(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        type Count = (&'static str, &'static str, fn(&NodeReport) -> u64);
        let counts: [Count; 6] = [
            ("requests", "Requests a rank has done its part of", |report| report.requests),
            ("failures", "Requests that ended before a rank was done", |report| report.failures),
            ("missed_tensors", "Tensors a rank went on without", |report| report.missed),
            ("degraded", "Answers marked as degraded", |report| report.degraded),
            ("sent_bytes", "Bytes of all frames sent, headers included", |report| {
                report.bytes_sent
            }),
            ("sent_frames", "Frames sent", |report| report.frames_sent),
        ];
        for (name, help, count) in counts {
            self.each_rank(out, (name, help), |each, rank, report| {
                each.counter(&[rank], count(report))
            })?;
        }
        type Time = (&'static str, &'static str, fn(&NodeReport) -> f64);
        let times: [Time; 3] = [
            ("compute_seconds", "Time in the engine", |report| report.compute_ms),
            (
                "waiting_seconds",
                "Time in which every request at hand waited for a tensor",
                |report| report.waiting_ms,
            ),
            ("codec_seconds", "Time in turning tensors into frames and back", |r| r.codec_ms),
        ];
        for (name, help, ms) in times {
            self.each_rank(out, (name, help), |each, rank, report| {
                each.counter(&[rank], ms(report) / 1e3)
            })?;
        }
        let mut latency = Histogram::default();
        for report in &self.own.reports {
            latency.merge(&report.latency);
        }
        let help = "Time from handing a request to the cluster to its answer, where this process takes requests";
        histogram(out, "inference_duration_seconds", help, &latency)
    }

    fn transfers(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let transfer = |number: u32| ("transfer", format!("t{number}"));
        let sent = "Bytes sent by each transfer, headers included";
        self.each_rank(out, ("transfer_sent_bytes", sent), |each, rank, report| {
            report.sends.iter().try_for_each(|send| {
                let to = ("to", send.to.to_string());
                each.counter(&[rank.clone(), transfer(send.transfer), to], send.bytes)
            })
        })?;
        self.each_rank(
            out,
            ("transfer_sent_frames", "Frames sent by each transfer"),
            |each, rank, report| {
                report.sends.iter().try_for_each(|send| {
                    let to = ("to", send.to.to_string());
                    each.counter(&[rank.clone(), transfer(send.transfer), to], send.frames)
                })
            },
        )?;
        let waited = "Time between coming to each receive and its tensor being there";
        self.each_rank(out, ("transfer_waited_seconds", waited), |each, rank, report| {
            report.receives.iter().try_for_each(|receive| {
                let from = ("from", receive.from.to_string());
                let labels = [rank.clone(), transfer(receive.transfer), from];
                each.counter(&labels, receive.waited_ms / 1e3)
            })
        })
    }

    fn http(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "HTTP answers by endpoint and status code";
        let mut each =
            Each(out.encode_descriptor("http_answers", help, None, MetricType::Counter)?);
        for &(endpoint, code, answers) in &self.http.answers {
            let labels = [("endpoint", endpoint.to_owned()), ("code", code.to_string())];
            each.counter(&labels, answers)?;
        }
        let help = "Time of inference requests over HTTP, the queue included";
        histogram(out, "http_request_duration_seconds", help, &self.http.latency)?;
        let help = "HTTP inference requests being answered";
        gauge(out, "http_running", help, self.http.running as i64)?;
        let help = "HTTP inference requests that wait for their turn";
        gauge(out, "http_queued", help, self.http.queued as i64)
    }

    /// A counter with members for each rank that the process computes.
    fn each_rank(
        &self,
        out: &mut DescriptorEncoder<'_>,
        (name, help): (&str, &str),
        members: impl Fn(&mut Each<'_>, Label, &NodeReport) -> fmt::Result,
    ) -> fmt::Result {
        let mut each = Each(out.encode_descriptor(name, help, None, MetricType::Counter)?);
        for report in &self.own.reports {
            members(&mut each, ("rank", report.rank.to_string()), report)?;
        }
        Ok(())
    }
}

impl Collector for Page {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> fmt::Result {
        self.cluster(&mut out)?;
        self.ranks(&mut out)?;
        self.transfers(&mut out)?;
        self.http(&mut out)
    }
}

fn gauge(out: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: i64) -> fmt::Result {
    let metric = ConstGauge::new(value);
    metric.encode(out.encode_descriptor(name, help, None, metric.metric_type())?)
}

fn histogram(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    histogram: &Histogram,
) -> fmt::Result {
    let bounds = BOUNDS_MS.iter().map(|ms| ms / 1e3).chain([f64::INFINITY]);
    let counts = histogram.counts.iter().copied().chain(std::iter::repeat(0));
    let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
    let (sum, count) = (histogram.sum_ms / 1e3, histogram.count());
    out.encode_descriptor(name, help, None, MetricType::Histogram)?
        .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
}

/// Encodes the members of one family.
struct Each<'a>(MetricEncoder<'a>);

type Label = (&'static str, String);

impl Each<'_> {
    fn counter<N, const LABELS: usize>(&mut self, labels: &[Label; LABELS], value: N) -> fmt::Result
    where
        ConstCounter<N>: EncodeMetric,
    {
        ConstCounter::new(value).encode(self.0.encode_family(labels)?)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::node::{ReceiveReport, SendReport};

    #[test]
    fn every_count_has_its_line() {
        let mut latency = Histogram::default();
        latency.add(Duration::from_millis(10));
        let report = NodeReport {
            rank: 1,
            requests: 5,
            failures: 1,
            missed: 3,
            degraded: 2,
            compute_ms: 1500.0,
            waiting_ms: 250.0,
            codec_ms: 1.0,
            sends: vec![SendReport { transfer: 3, step: None, to: 2, bytes: 99, frames: 7 }],
            receives: vec![ReceiveReport { transfer: 4, step: None, waited_ms: 20.0, from: 0 }],
            latency,
            ..NodeReport::default()
        };
        let http =
            HttpReport { answers: vec![("infer", 429, 2)], running: 3, ..HttpReport::default() };
        let (reports, missing) = (vec![report], [2].into());
        let own = Own { reports, missing, takeovers: 2, ..Own::default() };
        let text = Page { nodes: 4, own, http }.text();
        for line in [
            "# TYPE snn_inference_duration_seconds histogram",
            "snn_peers_present 2",
            "snn_peers_missing 1",
            "snn_takeovers_total 2",
            "snn_requests_total{rank=\"1\"} 5",
            "snn_failures_total{rank=\"1\"} 1",
            "snn_missed_tensors_total{rank=\"1\"} 3",
            "snn_degraded_total{rank=\"1\"} 2",
            "snn_compute_seconds_total{rank=\"1\"} 1.5",
            "snn_waiting_seconds_total{rank=\"1\"} 0.25",
            "snn_codec_seconds_total{rank=\"1\"} 0.001",
            "snn_inference_duration_seconds_sum 0.01",
            "snn_inference_duration_seconds_count 1",
            "snn_inference_duration_seconds_bucket{le=\"0.008\"} 0",
            "snn_inference_duration_seconds_bucket{le=\"0.012\"} 1",
            "snn_inference_duration_seconds_bucket{le=\"+Inf\"} 1",
            "snn_transfer_sent_bytes_total{rank=\"1\",transfer=\"t3\",to=\"2\"} 99",
            "snn_transfer_sent_frames_total{rank=\"1\",transfer=\"t3\",to=\"2\"} 7",
            "snn_transfer_waited_seconds_total{rank=\"1\",transfer=\"t4\",from=\"0\"} 0.02",
            "snn_http_answers_total{endpoint=\"infer\",code=\"429\"} 2",
            "snn_http_running 3",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
