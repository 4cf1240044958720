//! The compiler's process alone, for the tests of this crate; the agent starts itself for it.

fn main() -> std::process::ExitCode {
    krustlet_runtime::compiler_main(std::env::args_os().skip(1))
}
