//! A stream that ends where nobody reads: a write that comes to nothing for a while is an error.
//!
//! [`Impatient`] takes a socket and a time; gives the same socket, whose writes fail with
//! [`io::ErrorKind::TimedOut`] once none of them could write anything for so long. Whoever reads
//! slowly, but reads, is served to the end. Reading, flushing and closing are the socket's own: they
//! keep nobody waiting, or have limits elsewhere.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// A stream whose writes do not wait for ever.
#[derive(Debug)]
pub(super) struct Impatient<S> {
    stream: S,
    within: Duration,
    /// Runs while a write waits, and ends when it has waited too long.
    waited: Option<Pin<Box<Sleep>>>,
}

impl<S> Impatient<S> {
    /// The stream, whose writes may wait for `within`.
    pub(super) fn new(stream: S, within: Duration) -> Impatient<S> {
        Impatient { stream, within, waited: None }
    }

    /// What has become of a write: where it waits, it must not for too long.
    fn judge(
        &mut self,
        written: Poll<io::Result<usize>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.waited = None;
            return written;
        }
        let within = self.within;
        let waited = self.waited.get_or_insert_with(|| Box::pin(tokio::time::sleep(within)));
        ready!(waited.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Impatient<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Impatient<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(context, bytes);
        this.judge(written, context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(context, parts);
        this.judge(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// What the pipe between both ends holds, in bytes.
    const HELD: usize = 16;

    #[tokio::test]
    async fn who_never_reads_is_given_up() {
        let (near, _far) = tokio::io::duplex(HELD);
        let mut near = Impatient::new(near, Duration::from_millis(50));
        near.write_all(&[0; HELD]).await.unwrap();
        let error = near.write_all(&[0; HELD]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn who_reads_slowly_gets_everything() {
        let (near, mut far) = tokio::io::duplex(HELD);
        let mut near = Impatient::new(near, Duration::from_secs(2));
        let sent: Vec<u8> = (0..HELD as u8 * 10).collect();
        let write = async {
            near.write_all(&sent).await.unwrap();
            drop(near);
        };
        let read = async {
            let (mut read, mut part) = (Vec::new(), [0; HELD]);
            loop {
                // All of them together take longer than one write may.
                tokio::time::sleep(Duration::from_millis(250)).await;
                match far.read(&mut part).await.unwrap() {
                    0 => return read,
                    length => read.extend_from_slice(&part[..length]),
                }
            }
        };
        let ((), read) = tokio::join!(write, read);
        assert_eq!(read, sent);
    }
}
