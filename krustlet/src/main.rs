//! `krustlet`: a Kubernetes node agent that runs WebAssembly.

mod addresses;
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
mod keys;
mod logs;
mod memory;
mod node;
mod panics;
mod pod;
mod pods;
mod policies;
mod ports;
mod pressure;
mod reach;
mod reasons;
mod services;
mod telemetry;
mod trees;
mod view;

use clap::Parser;
use std::process::ExitCode;

/// How the agent starts itself to compile a module, in a process that is given nothing else.
const COMPILE: &str = "compile-module";

fn main() -> ExitCode {
    // Before anything is read or started: the compiler's process is to have nothing that it does not need.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == COMPILE) {
        return krustlet_runtime::compiler_main(std::env::args_os().skip(2));
    }
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
