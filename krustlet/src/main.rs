//! `krustlet`: a Kubernetes node agent that runs WebAssembly.

mod agent;
mod api;
mod backoff;
mod bootstrap;
mod certificates;
mod cli;
mod client;
mod events;
mod google;
mod node;
mod pod;
mod pods;
mod ports;
mod reasons;
mod telemetry;

use clap::Parser;

fn main() -> anyhow::Result<()> {
    let options = cli::Options::parse();
    telemetry::init()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(agent::run(options))
}
