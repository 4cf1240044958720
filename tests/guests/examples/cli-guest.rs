//! A `wasi:cli/run` component. The arguments are commands, joined by `then`: `print hello then sleep 50 then exit 3`.

use std::io::Read as _;

use guests::{
    allocate, args, deep, env, fill, hard_link, list, lists, make_directory, print, print_error, read, read_ahead,
    rename, sleep, spin, symlink, trap, wait_for, write,
};
use wasip2::cli::{environment, exit, stdin};

const COMMANDS: [&str; 24] = [
    "ahead", "alloc", "args", "await", "cat", "deep", "env", "eprint", "exit", "fail", "fill", "link", "lists", "ls",
    "mkdir", "print", "rename", "sleep", "spin", "stdin", "symlink", "trap", "version", "write",
];

struct Cli;

wasip2::cli::command::export!(Cli);

impl wasip2::exports::cli::run::Guest for Cli {
    fn run() -> Result<(), ()> {
        let arguments = environment::get_arguments();
        let words: Vec<_> = arguments.iter().map(String::as_str).collect();
        // Whether the name of the program comes first is the host's choice.
        let words = match words.split_first() {
            Some((first, rest)) if !COMMANDS.contains(first) => rest,
            _ => &words,
        };
        words.split(|word| *word == "then").try_for_each(|command| {
            run(command).map_err(|error| {
                print_error(&format!("{}: {error}", command.join(" ")));
            })
        })
    }
}

fn run(command: &[&str]) -> Result<(), String> {
    match command {
        [] => Ok(()),
        ["exit", code] => {
            exit::exit_with_code(number(code)?);
            Ok(())
        }
        ["fail"] => Err("asked to".into()),
        ["print", words @ ..] => said(words.join(" ")),
        ["eprint", words @ ..] => {
            print_error(&words.join(" "));
            Ok(())
        }
        ["version"] => said(guests::VERSION.into()),
        ["env"] => said(env()),
        ["args"] => said(args()),
        ["cat", path] => {
            let content = read(path).map_err(|error| error.name().to_owned())?;
            said(String::from_utf8_lossy(&content).into_owned())
        }
        ["write", path, text] => write(path, text).map_err(|error| error.name().to_owned()),
        ["await", path] => {
            wait_for(path);
            Ok(())
        }
        ["mkdir", path] => make_directory(path).map_err(|error| error.name().to_owned()),
        ["rename", from, to] => rename(from, to).map_err(|error| error.name().to_owned()),
        ["symlink", target, path] => symlink(target, path).map_err(|error| error.name().to_owned()),
        ["link", from, to] => hard_link(from, to).map_err(|error| error.name().to_owned()),
        ["deep", path, levels] => deep(path, number(levels)?).map_err(|error| error.name().to_owned()),
        ["fill", path, mib] => fill(path, number(mib)?).map_err(|error| error.name().to_owned()),
        ["ls", path] => said(list(path).map_err(|error| error.name().to_owned())?),
        ["lists", path, count] => lists(path, number(count)?).map_err(|error| error.name().to_owned()),
        ["ahead", path, count] => read_ahead(path, number(count)?).map_err(|error| error.name().to_owned()),
        ["stdin"] => {
            let mut input = Vec::new();
            stdin::get_stdin().read_to_end(&mut input).map_err(|error| error.to_string())?;
            said(format!("end of input after {} bytes", input.len()))
        }
        ["sleep", milliseconds] => {
            sleep(number(milliseconds)?);
            Ok(())
        }
        ["alloc", mib] => {
            allocate(number(mib)?);
            said(format!("allocated {mib} MiB"))
        }
        ["spin"] => spin(),
        ["trap"] => trap(),
        _ => Err(format!("no such command; there are {}", COMMANDS.join(" "))),
    }
}

fn said(line: String) -> Result<(), String> {
    print(&line);
    Ok(())
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text} is not a number in range"))
}
