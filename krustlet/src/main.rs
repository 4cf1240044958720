//! `krustlet`: a Kubernetes node agent that runs WebAssembly.

mod agent;
mod api;
mod backoff;
mod bootstrap;
mod certificates;
mod cli;
mod client;
mod disk;
mod events;
mod eviction;
mod google;
mod http_client;
mod image_gc;
mod logs;
mod node;
mod panics;
mod pod;
mod pods;
mod ports;
mod reasons;
mod telemetry;
mod trees;
mod view;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let options = cli::Options::parse();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("krustlet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: cli::Options) -> anyhow::Result<()> {
    telemetry::init()?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(agent::run(options))
}
