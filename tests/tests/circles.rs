//! The files of a library depend on each other in one direction: none needs itself by way of others.
//!
//! A file needs those that it names in `use` and in paths, re-exports followed to where a thing is defined.
//! Tests and documentation may name what they like.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemUse, UseTree, Visibility};
use tests::Result;

/// A module's path below the crate's root.
type Module = Vec<String>;

/// What a file of a crate says.
#[derive(Default)]
struct Source {
    /// Names that it takes from elsewhere.
    paths: Vec<Vec<String>>,
    /// Names that it has for others, and what they stand for.
    reexports: BTreeMap<String, Vec<String>>,
}

#[test]
fn no_file_of_a_library_needs_itself_by_way_of_others() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for library in [
        "colo-core",
        "colo-heartbeat",
        "migration-net",
        "migration-stream",
        "multifd",
        "qmp-types",
        "ram-cache",
        "vmstate",
    ] {
        let sources = read(&root.join(library).join("src")).unwrap();
        assert!(sources.len() > 5, "{library}: {} files", sources.len());
        let needs = needs(&sources);
        assert!(needs.values().any(|needed| !needed.is_empty()), "{library}");
        assert_eq!(circle(&needs), None, "{library}");
    }
}

#[test]
fn a_circle_is_found_through_reexports_and_paths() {
    let of = |files: &[(&str, &str)]| {
        let sources = files.iter().map(|(module, text)| {
            let module = module.split("::").filter(|part| !part.is_empty());
            (module.map(str::to_owned).collect(), source(text).unwrap())
        });
        circle(&needs(&sources.collect()))
    };
    let root = ("", "mod a; mod b; pub use a::A;");
    let a = ("a", "use crate::b::B; pub struct A(B);");
    assert_eq!(of(&[root, a, ("b", "pub struct B;")]), None);
    let by_reexport = ("b", "use super::A; pub struct B(Option<Box<A>>);");
    assert!(of(&[root, a, by_reexport]).is_some());
    let by_path = ("b", "pub struct B; pub(super) fn f(a: crate::a::A) {}");
    assert!(of(&[root, a, by_path]).is_some());
    let in_tests = (
        "b",
        "pub struct B; #[cfg(test)] mod tests { use crate::A; }",
    );
    assert_eq!(of(&[root, a, in_tests]), None);
}

/// The files below a directory, without those of tests alone.
fn read(root: &Path) -> Result<BTreeMap<Module, Source>> {
    let mut sources = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let below = path.strip_prefix(root)?.with_extension("");
            let parts = below.iter().map(|part| part.to_string_lossy().into_owned());
            let mut module: Module = parts.collect();
            if matches!(module.last().map(String::as_str), Some("mod" | "lib")) {
                module.pop();
            }
            if module.iter().any(|part| part.ends_with("tests")) {
                continue;
            }
            let text = fs::read_to_string(&path)?;
            let source = source(&text).map_err(|e| format!("{}: {e}", path.display()))?;
            sources.insert(module, source);
        }
    }
    Ok(sources)
}

fn source(text: &str) -> Result<Source> {
    let mut source = Source::default();
    for item in &syn::parse_file(text)?.items {
        source.visit_item(item);
    }
    Ok(source)
}

/// Whether something is compiled for tests or documentation alone.
fn is_aside(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let Ok(list) = attribute.meta.require_list() else {
            return false;
        };
        let condition = list.tokens.to_string();
        let mut words = condition.split(|c: char| !c.is_alphanumeric());
        list.path.is_ident("cfg") && words.any(|word| matches!(word, "test" | "doc" | "doctest"))
    })
}

impl<'ast> Visit<'ast> for Source {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Mod(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            Item::Struct(item) => &item.attrs,
            _ => return visit::visit_item(self, item),
        };
        if !is_aside(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let mut paths = Vec::new();
        unfold(&item.tree, &mut Vec::new(), &mut paths);
        if matches!(item.vis, Visibility::Inherited) {
            self.paths.extend(paths.into_iter().map(|(path, _)| path));
        } else {
            let names = paths.into_iter().map(|(path, name)| (name, path));
            self.reexports.extend(names);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        // A single name is a variable's, or was taken by a `use`.
        if path.segments.len() > 1 {
            let parts = path.segments.iter().map(|part| part.ident.to_string());
            self.paths.push(parts.collect());
        }
        visit::visit_path(self, path);
    }

    fn visit_visibility(&mut self, _: &'ast Visibility) {}
}

/// The paths of a `use`, each with the name that it is called by.
fn unfold(tree: &UseTree, before: &mut Vec<String>, paths: &mut Vec<(Vec<String>, String)>) {
    let mut end = |last: Option<String>, name: String| {
        let path = before.iter().cloned().chain(last).collect();
        paths.push((path, name));
    };
    match tree {
        UseTree::Path(path) => {
            before.push(path.ident.to_string());
            unfold(&path.tree, before, paths);
            before.pop();
        }
        UseTree::Group(group) => {
            for tree in &group.items {
                unfold(tree, before, paths);
            }
        }
        UseTree::Name(name) if name.ident == "self" => {
            let name = before.last().cloned().unwrap_or_default();
            end(None, name);
        }
        UseTree::Name(name) => end(Some(name.ident.to_string()), name.ident.to_string()),
        UseTree::Rename(rename) => {
            end(Some(rename.ident.to_string()), rename.rename.to_string());
        }
        UseTree::Glob(_) => end(None, "*".into()),
    }
}

/// The modules that each needs.
fn needs(sources: &BTreeMap<Module, Source>) -> BTreeMap<Module, BTreeSet<Module>> {
    let of = |(module, source): (&Module, &Source)| {
        let paths = source.paths.iter();
        let needed = paths.filter_map(|path| home(sources, module, path, 0));
        let needed = needed.filter(|needed| needed != module).collect();
        (module.clone(), needed)
    };
    sources.iter().map(of).collect()
}

/// Where the thing is defined that `path` names in `module`, if it is in this crate.
fn home(
    sources: &BTreeMap<Module, Source>,
    module: &Module,
    path: &[String],
    depth: u8,
) -> Option<Module> {
    let mut at = module.clone();
    let mut rest = path;
    match rest.first()?.as_str() {
        "crate" => {
            at.clear();
            rest = &rest[1..];
        }
        "self" => rest = &rest[1..],
        "super" => {
            while rest.first().is_some_and(|part| part == "super") {
                at.pop();
                rest = &rest[1..];
            }
        }
        first => {
            let child = at.iter().cloned().chain([first.to_owned()]).collect();
            sources.get::<Module>(&child)?;
        }
    }
    while let Some((first, others)) = rest.split_first() {
        at.push(first.clone());
        if !sources.contains_key(&at) {
            at.pop();
            break;
        }
        rest = others;
    }
    let reexport = rest
        .first()
        .and_then(|name| sources.get(&at)?.reexports.get(name));
    match reexport {
        Some(path) if depth < 8 => home(sources, &at, path, depth + 1).or(Some(at)),
        _ => Some(at),
    }
}

/// Some modules of which each needs the next, and the last the first.
fn circle(needs: &BTreeMap<Module, BTreeSet<Module>>) -> Option<Vec<String>> {
    let mut left = needs.clone();
    // What needs nothing that is left is in no circle.
    loop {
        let known: BTreeSet<Module> = left.keys().cloned().collect();
        let before = left.len();
        left.retain(|_, needed| needed.iter().any(|needed| known.contains(needed)));
        if left.len() == before {
            break;
        }
    }
    let mut way = vec![left.keys().next()?.clone()];
    loop {
        let next = left[way.last()?]
            .iter()
            .find(|needed| left.contains_key(*needed))?;
        if let Some(begin) = way.iter().position(|module| module == next) {
            return Some(
                way[begin..]
                    .iter()
                    .map(|module| module.join("::"))
                    .collect(),
            );
        }
        way.push(next.clone());
    }
}
