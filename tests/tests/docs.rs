//! Documents that are made from the code say what the code says.

use std::path::Path;

use anyhow::{Context, Result, ensure};

/// With `UPDATE_DOCS=1` in the environment the document is written instead.
#[test]
fn the_table_of_defaults_is_the_codes() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/DEFAULTS.md");
    let made = controller_api::defaults::markdown();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &made)?;
    }
    let written = std::fs::read_to_string(&path).context("docs/DEFAULTS.md")?;
    ensure!(
        written == made,
        "docs/DEFAULTS.md is behind the code; run `UPDATE_DOCS=1 cargo test -p tests --test docs`"
    );
    Ok(())
}
