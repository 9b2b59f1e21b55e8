//! `soccr generate`: what is installed beside the command, made of the same words as its help.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

/// What no option tells.
const SECTIONS: &str = include_str!("generate/sections.roff");

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The folder, which gets man/ and completions/.
    dir: PathBuf,
}

pub fn run(arguments: &Arguments, command: &Command) -> Result<bool> {
    write(&arguments.dir, shown(command))
        .with_context(|| format!("cannot write to {}", arguments.dir.display()))?;
    Ok(true)
}

/// Without what is hidden from `--help` too.
fn shown(command: &Command) -> Command {
    let subcommands = command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()).cloned();
    Command::new("soccr")
        .version(env!("CARGO_PKG_VERSION"))
        .about(command.get_about().cloned().unwrap_or_default())
        .long_about(command.get_long_about().cloned().unwrap_or_default())
        .subcommand_required(true)
        .subcommands(subcommands)
}

fn write(dir: &Path, mut command: Command) -> std::io::Result<()> {
    let (man, completions) = (dir.join("man"), dir.join("completions"));
    fs::create_dir_all(&man)?;
    fs::create_dir_all(&completions)?;
    let pages = command.clone().disable_help_subcommand(true);
    let mut page = Vec::new();
    Man::new(pages.clone()).render(&mut page)?;
    clap_mangen::generate_to(pages, &man)?;
    page.extend(SECTIONS.bytes());
    fs::write(man.join("soccr.1"), page)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, "soccr", &completions)?;
    }
    Ok(())
}
