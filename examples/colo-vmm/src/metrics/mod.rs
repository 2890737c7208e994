//! `--metrics ADDRESS`: figures for Prometheus, in its text format, by `GET /metrics`.
//!
//! | file | what |
//! |---|---|
//! | `families.rs` | which figures, under which names |
//! | `text.rs` | the format |
//! | `http.rs` | a request in, an answer out |
//! | `server.rs` | the sockets |
//!
//! The figures themselves are counted in `figures.rs`. HTTP and the format take some
//! two hundred lines here: a server crate would bring a runtime or a thread for each client, and
//! a metrics crate counters of its own beside those that QMP is answered from.
//!
//! Whoever can reach the address can read the figures, and do nothing else. A client that is silent,
//! slow or does not read is disconnected in the end, and disturbs nobody before.

mod families;
mod http;
mod server;
mod text;

use std::io;

pub use self::server::MetricsServer;
use crate::figures::Observation;
use crate::qmp::QmpAddress;

/// Serves what `guests` says.
///
/// # Errors
/// The address cannot be listened on, or the host has no threads or descriptors left.
pub(crate) fn serve(
    address: &QmpAddress,
    guests: impl Fn() -> Vec<Observation> + Send + 'static,
) -> io::Result<MetricsServer> {
    let server = MetricsServer::start(address, move || families::text(&guests()))
        .map_err(|error| io::Error::new(error.kind(), format!("metrics at {address}: {error}")))?;
    tracing::info!(address = %server.address(), "metrics are served");
    Ok(server)
}
