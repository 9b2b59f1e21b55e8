//! `nftables-<ns>.img`: a network namespace's nftables rules as text.
//!
//! CRIU writes what `nft list ruleset` prints, without magic or length, and feeds it to nft at the
//! restore. A lock that stood at the dump is in it, too, and would come back to life.

use std::io::Read;
use std::ops::Range;

use super::{ImageDir, ImageError};

/// Removes the table `family` `name` from all rule images; the rest stays byte for byte. Returns
/// how many files were changed.
///
/// # Errors
/// [`ImageError`] for the first file that cannot be read or replaced; files before it are changed.
pub fn strip_table(dir: &ImageDir, family: &str, name: &str) -> Result<usize, ImageError> {
    strip_table_elsewhere(dir, family, name, None)
}

/// As [`strip_table`], but for the rules of the network namespace with this id, which stay as they are.
///
/// # Errors
/// As [`strip_table`].
pub fn strip_table_elsewhere(
    dir: &ImageDir,
    family: &str,
    name: &str,
    kept: Option<u32>,
) -> Result<usize, ImageError> {
    let kept = kept.map(|id| format!("nftables-{id}.img"));
    let mut files = Vec::new();
    dir.for_each_name(|file| {
        if file.starts_with("nftables-") && file.ends_with(".img") && kept.as_deref() != Some(file) {
            files.push(file.to_owned());
        }
    })?;
    let mut changed = 0;
    for file in files {
        changed += usize::from(strip_file(dir, &file, family, name)?);
    }
    Ok(changed)
}

fn strip_file(dir: &ImageDir, file: &str, family: &str, name: &str) -> Result<bool, ImageError> {
    let image = dir.read(file)?;
    let mut text = Vec::new();
    image.file.take(image.size).read_to_end(&mut text).map_err(|e| ImageError::io("read", file, e))?;
    let header = [b"table", family.as_bytes(), name.as_bytes()];
    let cuts: Vec<_> = blocks(&text).filter(|block| is_table(&text[block.clone()], header)).collect();
    if cuts.is_empty() {
        return Ok(false);
    }
    let mut kept = Vec::with_capacity(cuts.len() + 1);
    let mut from = 0;
    for cut in cuts {
        kept.push(&text[from..cut.start]);
        from = cut.end;
    }
    kept.push(&text[from..]);
    dir.replace(file, &kept)?;
    Ok(true)
}

/// Whether the block begins with these three words and a brace.
fn is_table(block: &[u8], header: [&[u8]; 3]) -> bool {
    let Some(brace) = block.iter().position(|b| *b == b'{') else { return false };
    block[..brace].split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).eq(header)
}

/// The top-level blocks of a ruleset: from the beginning of a statement's line through the line end
/// after its closing brace. Text between them (comments, empty lines) belongs to none.
fn blocks(text: &[u8]) -> impl Iterator<Item = Range<usize>> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let mut start = None;
        let mut depth = 0usize;
        while at < text.len() {
            let token = at;
            match text[at] {
                b'#' => at = after(text, at, b'\n'),
                b'"' => at = after(text, at + 1, b'"'), // nft has no escapes: no quote is in a string
                b'{' => (depth, at) = (depth + 1, at + 1),
                b'}' => (depth, at) = (depth.saturating_sub(1), at + 1),
                b'\n' if depth == 0 => (start, at) = (None, at + 1), // a statement without a block
                _ => at += 1,
            }
            if start.is_none() && !text[token].is_ascii_whitespace() && text[token] != b'#' {
                start = Some(token);
            }
            if depth == 0 && text[token] == b'}' {
                at = after_blank_line_end(text, at);
                return Some(start.unwrap_or(token)..at);
            }
        }
        None
    })
}

/// The offset after the next `byte` from `at` on, or the end.
fn after(text: &[u8], at: usize, byte: u8) -> usize {
    let rest = text.get(at..).unwrap_or_default();
    rest.iter().position(|b| *b == byte).map_or(text.len(), |found| at + found + 1)
}

/// The offset after the line's end if only blanks are left in the line, else `at`.
fn after_blank_line_end(text: &[u8], at: usize) -> usize {
    let blanks = text[at..].iter().take_while(|b| matches!(**b, b' ' | b'\t' | b'\r')).count();
    if text.get(at + blanks) == Some(&b'\n') { at + blanks + 1 } else { at }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "table inet CRIU-0a1b {\n\tset v4 {\n\t\ttypeof ip saddr . tcp sport\n\
        \t\telements = { 10.0.0.1 . 80 comment \"} \n}\" }\n\t}\n\n\tchain in { # }\n\t\ttype filter hook \
        prerouting priority raw; policy accept;\n\t\tmeta mark 0x0000c114 accept\n\t}\n}\n";
    const OTHER: &str =
        "table ip nat {\n\tchain c {\n\t\tcounter comment \"table inet CRIU-0a1b {\"\n\t}\n}\n";

    fn strip(text: &str) -> (bool, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nftables-9.img");
        std::fs::write(&path, text).unwrap();
        let dir = ImageDir::open(folder.path()).unwrap();
        let changed = strip_table(&dir, "inet", "CRIU-0a1b").unwrap();
        (changed == 1, std::fs::read_to_string(path).unwrap())
    }

    #[test]
    fn removes_the_table_wherever_it_stands() {
        assert_eq!(strip(OURS), (true, String::new()));
        assert_eq!(strip(&format!("{OTHER}{OURS}")), (true, OTHER.into()));
        assert_eq!(strip(&format!("{OURS}{OTHER}")), (true, OTHER.into()));
        assert_eq!(strip(&format!("{OTHER}{OURS}{OTHER}")), (true, format!("{OTHER}{OTHER}")));
        assert_eq!(
            strip(&format!("# a warning {{\n{OURS}\n{OTHER}")),
            (true, format!("# a warning {{\n\n{OTHER}"))
        );
    }

    #[test]
    fn leaves_the_rules_of_one_namespace() {
        let folder = tempfile::tempdir().unwrap();
        for id in [9, 10] {
            std::fs::write(folder.path().join(format!("nftables-{id}.img")), OURS).unwrap();
        }
        let dir = ImageDir::open(folder.path()).unwrap();
        assert_eq!(strip_table_elsewhere(&dir, "inet", "CRIU-0a1b", Some(9)).unwrap(), 1);
        assert_eq!(std::fs::read_to_string(folder.path().join("nftables-9.img")).unwrap(), OURS);
    }

    #[test]
    fn leaves_everything_else() {
        for text in [
            String::new(),
            OTHER.into(),
            OURS.replace("inet CRIU", "ip CRIU"),
            OURS.replace("0a1b", "0a1bc"),
            OURS.replace("table inet CRIU-0a1b {", "table inet CRIU-0a1b "),
            "}\n}{\"".into(),
            OURS[..OURS.len() - 3].into(), // not closed
        ] {
            assert_eq!(strip(&text), (false, text));
        }
    }
}
