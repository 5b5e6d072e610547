//! A client of one connection that stays open: enough of HTTP to ask a node.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Longer than any request may take, takeover included.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a node is asked.
pub(crate) struct Request {
    /// Method and path.
    pub(crate) line: String,
    pub(crate) body: String,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// The numbers of the first output.
    pub(crate) fn numbers(&self) -> Result<Vec<f64>> {
        let json: Value = serde_json::from_slice(&self.body)?;
        let data = json["outputs"][0]["data"].as_array().context("no output")?;
        data.iter().map(|number| number.as_f64().context("no number")).collect()
    }
}

pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    pub(crate) fn open(address: SocketAddr) -> Result<Connection> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Connection { stream: BufReader::new(stream) })
    }

    pub(crate) fn get(&mut self, path: &str) -> Result<Answer> {
        self.ask(&format!("GET {path}"), "")
    }

    pub(crate) fn infer(&mut self, request: &Request) -> Result<Answer> {
        self.ask(&request.line, &request.body)
    }

    fn ask(&mut self, line: &str, body: &str) -> Result<Answer> {
        let length = body.len();
        let message =
            format!("{line} HTTP/1.1\r\nhost: snn\r\ncontent-length: {length}\r\n\r\n{body}");
        self.stream.get_mut().write_all(message.as_bytes())?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            ensure!(self.stream.read_line(&mut head)? > 0, "the connection ended");
        }
        let status = head.get(9..12).and_then(|status| status.parse().ok()).context("no status")?;
        let lower = head.to_ascii_lowercase();
        let length = lower.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length = length.and_then(|length| length.parse().ok()).context("no length")?;
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok(Answer { status, body })
    }
}

/// Whether two answers are the same up to the order of sums.
pub(crate) fn same(found: &[f64], expected: &[f64]) -> bool {
    let close = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-4 * b.abs().max(1.0);
    found.len() == expected.len() && found.iter().zip(expected).all(close)
}
