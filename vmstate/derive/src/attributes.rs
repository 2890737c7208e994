//! The `#[vmstate(..)]` attributes, parsed into what they mean.

use syn::ext::IdentExt as _;
use syn::meta::ParseNestedMeta;
use syn::spanned::Spanned as _;
use syn::{
    Attribute, DeriveInput, Error, Expr, ExprLit, ExprRange, Field, GenericArgument, Ident, Lit,
    LitInt, LitStr, Path, PathArguments, RangeLimits, Result, Type,
};

/// What is said about the struct.
pub(crate) struct Container {
    pub(crate) name: LitStr,
    pub(crate) version: u32,
    pub(crate) minimum_version: u32,
    pub(crate) validate: Option<Path>,
    pub(crate) pre_save: Option<Path>,
    pub(crate) pre_load: Option<Path>,
    pub(crate) post_load: Option<Path>,
}

impl Container {
    pub(crate) fn parse(input: &DeriveInput) -> Result<Self> {
        let (mut name, mut version, mut minimum) = (None, None, None);
        let (mut validate, mut pre_save, mut pre_load, mut post_load) = (None, None, None, None);
        for_each(&input.attrs, |meta| {
            if meta.path.is_ident("name") {
                set(&meta, &mut name, meta.value()?.parse::<LitStr>()?)
            } else if meta.path.is_ident("version") {
                set(&meta, &mut version, meta.value()?.parse::<LitInt>()?)
            } else if meta.path.is_ident("minimum_version") {
                set(&meta, &mut minimum, meta.value()?.parse::<LitInt>()?)
            } else if meta.path.is_ident("validate") {
                set(&meta, &mut validate, function(&meta)?)
            } else if meta.path.is_ident("pre_save") {
                set(&meta, &mut pre_save, function(&meta)?)
            } else if meta.path.is_ident("pre_load") {
                set(&meta, &mut pre_load, function(&meta)?)
            } else if meta.path.is_ident("post_load") {
                set(&meta, &mut post_load, function(&meta)?)
            } else {
                Err(meta.error(
                    "unknown attribute, expected name, version, minimum_version, validate, \
                     pre_save, pre_load or post_load",
                ))
            }
        })?;
        let missing = |what: &str| {
            Error::new(
                input.ident.span(),
                format!("#[vmstate({what} = ..)] is missing on the struct"),
            )
        };
        let name = name.ok_or_else(|| missing("name"))?;
        let text = name.value();
        if text.is_empty() || text.len() > 255 || text.contains('\0') {
            return Err(Error::new(
                name.span(),
                "the name must be 1 to 255 bytes without nul: it travels as a counted string",
            ));
        }
        let version_literal = version.ok_or_else(|| missing("version"))?;
        let version = version_literal.base10_parse()?;
        let minimum_version = match &minimum {
            Some(literal) => literal.base10_parse()?,
            None => version,
        };
        if minimum_version > version {
            return Err(Error::new(
                minimum.span(),
                format!("minimum_version {minimum_version} is above version {version}"),
            ));
        }
        Ok(Self {
            name,
            version,
            minimum_version,
            validate,
            pre_save,
            pre_load,
            post_load,
        })
    }
}

/// A field, and how it travels.
pub(crate) struct Member<'a> {
    pub(crate) ident: &'a Ident,
    pub(crate) ty: &'a Type,
    pub(crate) kind: Kind<'a>,
    /// The value when the field is not on the wire; `Default::default()` if not given.
    pub(crate) default: Option<Expr>,
    /// The name if it is not the Rust one.
    wire_name: Option<String>,
}

impl Member<'_> {
    /// The name in error messages and in the stream's self-description.
    pub(crate) fn name(&self) -> String {
        self.wire_name
            .clone()
            .unwrap_or_else(|| self.ident.unraw().to_string())
    }
}

/// How a field travels.
pub(crate) enum Kind<'a> {
    /// In its place among the fields.
    Wire(Box<Wire<'a>>),
    /// After the fields, when it is `Some` of this type.
    Subsection(&'a Type),
    /// Not at all.
    Skip,
}

/// A field that has its place among the others.
pub(crate) struct Wire<'a> {
    pub(crate) encoding: Encoding<'a>,
    pub(crate) since: Option<u32>,
    pub(crate) exists: Option<Expr>,
    /// What the value must be.
    pub(crate) equal: Option<Expr>,
    /// What the self-description calls its type.
    pub(crate) info: Option<LitStr>,
    /// Bytes are elements rather than a buffer.
    pub(crate) array: bool,
}

/// The form of a field's bytes.
pub(crate) enum Encoding<'a> {
    Plain,
    Nested,
    /// A nested description at this version.
    NestedAt(LitInt),
    Tmp,
    List {
        nested: bool,
        element: &'a Type,
        count: Count,
    },
    /// Some elements of an array.
    Part {
        element: &'a Type,
        len: &'a Expr,
        range: ExprRange,
    },
    Pointers {
        element: &'a Type,
        array: Option<&'a Expr>,
        count: Count,
        /// Which are not NULL, where only NULL ones have a marker.
        present: Option<Expr>,
    },
    Queue {
        element: &'a Type,
        max: Expr,
    },
    Tree {
        max: Expr,
    },
    Bits {
        count: Count,
    },
}

/// How many elements there are, and how many there may be.
pub(crate) struct Count {
    pub(crate) len: Expr,
    pub(crate) max: Expr,
}

impl Count {
    /// The field that counts, if it is one alone.
    pub(crate) fn field(&self) -> Option<&Ident> {
        match &self.len {
            Expr::Path(path) => path.path.get_ident(),
            _ => None,
        }
    }

    fn new(len: Expr, max: Option<Expr>) -> Result<Self> {
        let is_constant = matches!(len, Expr::Lit(_));
        let max = match max {
            Some(max) => max,
            None if is_constant => len.clone(),
            None => {
                return Err(Error::new(
                    len.span(),
                    "len needs max = ..: the count comes from the other side and must have a bound",
                ));
            }
        };
        Ok(Self { len, max })
    }
}

#[derive(Default)]
struct Raw {
    name: Option<LitStr>,
    info: Option<LitStr>,
    since: Option<LitInt>,
    default: Option<Expr>,
    exists: Option<Expr>,
    equal: Option<Expr>,
    array: Option<()>,
    len: Option<Expr>,
    max: Option<Expr>,
    bits: Option<Expr>,
    part: Option<ExprRange>,
    nested: Option<()>,
    version: Option<LitInt>,
    tmp: Option<()>,
    pointers: Option<Option<Expr>>,
    queue: Option<()>,
    tree: Option<()>,
    skip: Option<()>,
    subsection: Option<()>,
}

impl<'a> Member<'a> {
    pub(crate) fn parse(field: &'a Field, ident: &'a Ident, container: &Container) -> Result<Self> {
        let mut raw = Raw::parse(&field.attrs)?;
        let error = |message: &str| Err(Error::new(ident.span(), message));
        let default = raw.default.take();
        let wire_name = raw.name.take().map(|name| name.value());
        let kind = if raw.skip.is_some() {
            if raw.is_wire() || raw.subsection.is_some() || wire_name.is_some() {
                return error("skip goes together with default only");
            }
            Kind::Skip
        } else if raw.subsection.is_some() {
            if raw.is_wire() || default.is_some() || wire_name.is_some() {
                return error("subsection goes together with no other attribute");
            }
            let Some(inner) = generic_argument(&field.ty, "Option") else {
                return Err(Error::new(
                    field.ty.span(),
                    "a subsection is an Option<T>: None when it is not needed",
                ));
            };
            Kind::Subsection(inner)
        } else {
            if default.is_some() && raw.since.is_none() && raw.exists.is_none() {
                return error("default is for fields with since, exists or skip");
            }
            let since = match &raw.since {
                None => None,
                Some(literal) => {
                    let since = literal.base10_parse::<u32>()?;
                    if since > container.version {
                        return Err(Error::new(
                            literal.span(),
                            format!("since {since} is above version {}", container.version),
                        ));
                    }
                    Some(since)
                }
            };
            Kind::Wire(Box::new(Wire {
                since,
                exists: raw.exists.take(),
                equal: raw.equal.take(),
                info: raw.info.take(),
                array: raw.array.is_some(),
                encoding: raw.encoding(&field.ty, ident)?,
            }))
        };
        Ok(Self {
            ident,
            ty: &field.ty,
            kind,
            default,
            wire_name,
        })
    }
}

impl Raw {
    /// Whether anything is said of the field's bytes.
    const fn is_wire(&self) -> bool {
        self.since.is_some()
            || self.exists.is_some()
            || self.equal.is_some()
            || self.info.is_some()
            || self.array.is_some()
            || self.len.is_some()
            || self.max.is_some()
            || self.bits.is_some()
            || self.part.is_some()
            || self.nested.is_some()
            || self.version.is_some()
            || self.tmp.is_some()
            || self.pointers.is_some()
            || self.queue.is_some()
            || self.tree.is_some()
    }

    fn encoding<'a>(self, ty: &'a Type, ident: &Ident) -> Result<Encoding<'a>> {
        let error = |message: &str| Err(Error::new(ident.span(), message));
        let forms = [
            self.bits.is_some(),
            self.part.is_some(),
            self.nested.is_some(),
            self.pointers.is_some(),
            self.queue.is_some(),
            self.tree.is_some(),
        ];
        if forms.iter().filter(|given| **given).count() > 1 {
            return error("bits, nested, part, pointers, queue and tree go one at a time");
        }
        if self.nested.is_none() && (self.version.is_some() || self.tmp.is_some()) {
            return error("version and tmp go together with nested");
        }
        let unbounded = "a list needs max = ..: its length comes from the other side";
        if self.queue.is_some() || self.tree.is_some() {
            if self.len.is_some() {
                return error("a queue or tree says itself where it ends, len is for others");
            }
            let Some(max) = self.max else {
                return error(unbounded);
            };
            if self.tree.is_some() {
                return Ok(Encoding::Tree { max });
            }
            let Some(element) = generic_argument(ty, "Vec") else {
                return Err(Error::new(ty.span(), "a queue is a Vec<T>"));
            };
            return Ok(Encoding::Queue { element, max });
        }
        if let Some(len) = self.bits {
            if self.len.is_some() {
                return error("bits is the number of bits, len is for others");
            }
            let count = Count::new(len, self.max)?;
            return Ok(Encoding::Bits { count });
        }
        if let Some(range) = self.part {
            let (Type::Array(array), None, None) = (ty, self.len, self.max) else {
                return Err(Error::new(
                    ty.span(),
                    "part is for an array [T; N], without len",
                ));
            };
            if range.start.is_none() || range.end.is_none() || !is_half_open(&range) {
                return Err(Error::new(range.span(), "part is a range such as 0..16"));
            }
            return Ok(Encoding::Part {
                element: &array.elem,
                len: &array.len,
                range,
            });
        }
        if let Some(present) = self.pointers {
            return pointers(ty, self.len, self.max, present);
        }
        let nested = self.nested.is_some();
        match (generic_argument(ty, "Vec"), self.len, self.max) {
            (Some(element), Some(len), max) => {
                if self.version.is_some() || self.tmp.is_some() {
                    return error("version and tmp are for single descriptions");
                }
                Ok(Encoding::List {
                    nested,
                    element,
                    count: Count::new(len, max)?,
                })
            }
            (Some(_), None, _) => error(
                "a Vec needs #[vmstate(len = \"..\", max = ..)]: the earlier field that counts it",
            ),
            (None, None, None) => match (nested, self.version, self.tmp) {
                (_, Some(_), Some(())) => error("version and tmp go one at a time"),
                (_, Some(version), None) => Ok(Encoding::NestedAt(version)),
                (_, None, Some(())) => Ok(Encoding::Tmp),
                (true, None, None) => Ok(Encoding::Nested),
                (false, None, None) => Ok(Encoding::Plain),
            },
            (None, ..) => Err(Error::new(ty.span(), "len and max are for a Vec<T>")),
        }
    }

    fn parse(attributes: &[Attribute]) -> Result<Self> {
        let mut raw = Self::default();
        for_each(attributes, |meta| {
            let Some(name) = meta.path.get_ident().map(ToString::to_string) else {
                return Err(meta.error("expected the name of an attribute"));
            };
            match name.as_str() {
                "name" => set(&meta, &mut raw.name, meta.value()?.parse()?),
                "info" => set(&meta, &mut raw.info, meta.value()?.parse()?),
                "since" => set(&meta, &mut raw.since, meta.value()?.parse()?),
                "default" => set(&meta, &mut raw.default, value(&meta)?),
                "exists" => set(&meta, &mut raw.exists, value(&meta)?),
                "equal" => set(&meta, &mut raw.equal, value(&meta)?),
                "array" => set(&meta, &mut raw.array, ()),
                "len" => set(&meta, &mut raw.len, value(&meta)?),
                "max" => set(&meta, &mut raw.max, value(&meta)?),
                "bits" => set(&meta, &mut raw.bits, value(&meta)?),
                "part" => {
                    let Expr::Range(range) = value(&meta)? else {
                        return Err(meta.error("part is a range such as 0..16"));
                    };
                    set(&meta, &mut raw.part, range)
                }
                "nested" => set(&meta, &mut raw.nested, ()),
                "version" => set(&meta, &mut raw.version, meta.value()?.parse()?),
                "tmp" => set(&meta, &mut raw.tmp, ()),
                "pointers" => {
                    let present = if meta.input.peek(syn::Token![=]) {
                        Some(value(&meta)?)
                    } else {
                        None
                    };
                    set(&meta, &mut raw.pointers, present)
                }
                "queue" => set(&meta, &mut raw.queue, ()),
                "tree" => set(&meta, &mut raw.tree, ()),
                "skip" => set(&meta, &mut raw.skip, ()),
                "subsection" => set(&meta, &mut raw.subsection, ()),
                _ => Err(meta.error(
                    "unknown attribute, expected name, info, since, default, exists, equal, \
                     nested, version, tmp, array, len, max, part, bits, pointers, queue, tree, \
                     skip or subsection",
                )),
            }
        })?;
        Ok(raw)
    }
}

fn pointers<'a>(
    ty: &'a Type,
    len: Option<Expr>,
    max: Option<Expr>,
    present: Option<Expr>,
) -> Result<Encoding<'a>> {
    let wanted = || {
        Error::new(
            ty.span(),
            "pointers is for [Option<T>; N], or for Vec<Option<T>> with len and max",
        )
    };
    if let Type::Array(array) = ty {
        let (Some(element), None, None) = (generic_argument(&array.elem, "Option"), len, max)
        else {
            return Err(wanted());
        };
        return Ok(Encoding::Pointers {
            element,
            array: Some(&array.len),
            count: Count {
                len: array.len.clone(),
                max: array.len.clone(),
            },
            present,
        });
    }
    let element = generic_argument(ty, "Vec").and_then(|item| generic_argument(item, "Option"));
    let (Some(element), Some(len)) = (element, len) else {
        return Err(wanted());
    };
    Ok(Encoding::Pointers {
        element,
        array: None,
        count: Count::new(len, max)?,
        present,
    })
}

const fn is_half_open(range: &ExprRange) -> bool {
    matches!(range.limits, RangeLimits::HalfOpen(_))
}

fn for_each(
    attributes: &[Attribute],
    mut each: impl FnMut(ParseNestedMeta<'_>) -> Result<()>,
) -> Result<()> {
    attributes
        .iter()
        .filter(|attribute| attribute.path().is_ident("vmstate"))
        .try_for_each(|attribute| attribute.parse_nested_meta(&mut each))
}

fn set<T>(meta: &ParseNestedMeta<'_>, slot: &mut Option<T>, value: T) -> Result<()> {
    if slot.replace(value).is_some() {
        return Err(meta.error("given twice"));
    }
    Ok(())
}

/// An attribute's value: an expression, written as such or in a string.
fn value(meta: &ParseNestedMeta<'_>) -> Result<Expr> {
    let expr = meta.value()?.parse()?;
    match string(&expr) {
        Ok(text) => text.parse(),
        Err(_) => Ok(expr),
    }
}

/// An attribute's value: the path of a function, written as such or in a string.
fn function(meta: &ParseNestedMeta<'_>) -> Result<Path> {
    match meta.value()?.parse::<Expr>()? {
        Expr::Path(path) => Ok(path.path),
        other => string(&other)?.parse(),
    }
}

fn string(expr: &Expr) -> Result<&LitStr> {
    match expr {
        Expr::Lit(ExprLit {
            lit: Lit::Str(text),
            ..
        }) => Ok(text),
        other => Err(Error::new(other.span(), "expected a path")),
    }
}

/// `T` of `outer<T>`.
fn generic_argument<'a>(ty: &'a Type, outer: &str) -> Option<&'a Type> {
    let Type::Path(path) = ty else { return None };
    let last = path.path.segments.last()?;
    let PathArguments::AngleBracketed(arguments) = &last.arguments else {
        return None;
    };
    match (last.ident == outer, arguments.args.first()) {
        (true, Some(GenericArgument::Type(inner))) if arguments.args.len() == 1 => Some(inner),
        _ => None,
    }
}
