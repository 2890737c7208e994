//! The `#[vmstate(..)]` attributes, parsed into what they mean.

use syn::ext::IdentExt as _;
use syn::meta::ParseNestedMeta;
use syn::spanned::Spanned as _;
use syn::{
    Attribute, DeriveInput, Error, Expr, ExprLit, Field, GenericArgument, Ident, Lit, LitInt,
    LitStr, Path, PathArguments, Result, Type,
};

/// What is said about the struct.
pub(crate) struct Container {
    pub(crate) name: LitStr,
    pub(crate) version: u32,
    pub(crate) minimum_version: u32,
    pub(crate) validate: Option<Path>,
}

impl Container {
    pub(crate) fn parse(input: &DeriveInput) -> Result<Self> {
        let (mut name, mut version, mut minimum, mut validate) = (None, None, None, None);
        for_each(&input.attrs, |meta| {
            if meta.path.is_ident("name") {
                set(&meta, &mut name, meta.value()?.parse::<LitStr>()?)
            } else if meta.path.is_ident("version") {
                set(&meta, &mut version, meta.value()?.parse::<LitInt>()?)
            } else if meta.path.is_ident("minimum_version") {
                set(&meta, &mut minimum, meta.value()?.parse::<LitInt>()?)
            } else if meta.path.is_ident("validate") {
                let value = match meta.value()?.parse::<Expr>()? {
                    Expr::Path(path) => path.path,
                    other => string(&other)?.parse()?,
                };
                set(&meta, &mut validate, value)
            } else {
                Err(meta.error(
                    "unknown attribute, expected name, version, minimum_version or validate",
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
}

impl Member<'_> {
    /// The name in error messages and in the stream's self-description.
    pub(crate) fn name(&self) -> String {
        self.ident.unraw().to_string()
    }
}

/// How a field travels.
pub(crate) enum Kind<'a> {
    /// In its place among the fields.
    Wire {
        encoding: Encoding<'a>,
        since: Option<u32>,
        exists: Option<Box<Expr>>,
    },
    /// After the fields, when it is `Some` of this type.
    Subsection(&'a Type),
    /// Not at all.
    Skip,
}

/// The form of a field's bytes.
pub(crate) enum Encoding<'a> {
    Plain,
    Nested,
    List {
        nested: bool,
        element: &'a Type,
        len: Ident,
        max: Box<Expr>,
    },
}

#[derive(Default)]
struct Raw {
    since: Option<LitInt>,
    default: Option<Expr>,
    exists: Option<Box<Expr>>,
    len: Option<Ident>,
    max: Option<Box<Expr>>,
    nested: Option<()>,
    skip: Option<()>,
    subsection: Option<()>,
}

impl<'a> Member<'a> {
    pub(crate) fn parse(field: &'a Field, ident: &'a Ident, container: &Container) -> Result<Self> {
        let raw = Raw::parse(&field.attrs)?;
        let error = |message: &str| Err(Error::new(ident.span(), message));
        let wire = raw.since.is_some()
            || raw.exists.is_some()
            || raw.len.is_some()
            || raw.max.is_some()
            || raw.nested.is_some();
        let kind = if raw.skip.is_some() {
            if wire || raw.subsection.is_some() {
                return error("skip goes together with default only");
            }
            Kind::Skip
        } else if raw.subsection.is_some() {
            if wire || raw.default.is_some() {
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
            if raw.default.is_some() && raw.since.is_none() && raw.exists.is_none() {
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
            Kind::Wire {
                encoding: Encoding::new(&field.ty, ident, raw.nested.is_some(), raw.len, raw.max)?,
                since,
                exists: raw.exists,
            }
        };
        Ok(Self {
            ident,
            ty: &field.ty,
            kind,
            default: raw.default,
        })
    }
}

impl<'a> Encoding<'a> {
    fn new(
        ty: &'a Type,
        ident: &Ident,
        nested: bool,
        len: Option<Ident>,
        max: Option<Box<Expr>>,
    ) -> Result<Self> {
        match (generic_argument(ty, "Vec"), len, max) {
            (Some(element), Some(len), Some(max)) => Ok(Self::List {
                nested,
                element,
                len,
                max,
            }),
            (Some(_), None, _) => Err(Error::new(
                ident.span(),
                "a Vec needs #[vmstate(len = \"..\", max = ..)]: the earlier field that counts it",
            )),
            (Some(_), Some(len), None) => Err(Error::new(
                len.span(),
                "len needs max = ..: the count comes from the other side and must have a bound",
            )),
            (None, None, None) if nested => Ok(Self::Nested),
            (None, None, None) => Ok(Self::Plain),
            (None, ..) => Err(Error::new(ty.span(), "len and max are for a Vec<T>")),
        }
    }
}

impl Raw {
    fn parse(attributes: &[Attribute]) -> Result<Self> {
        let mut raw = Self::default();
        for_each(attributes, |meta| {
            if meta.path.is_ident("since") {
                set(&meta, &mut raw.since, meta.value()?.parse()?)
            } else if meta.path.is_ident("default") {
                set(&meta, &mut raw.default, expression(meta.value()?.parse()?)?)
            } else if meta.path.is_ident("exists") {
                set(
                    &meta,
                    &mut raw.exists,
                    expression(meta.value()?.parse()?)?.into(),
                )
            } else if meta.path.is_ident("len") {
                let value = meta.value()?;
                let ident = if value.peek(LitStr) {
                    value.parse::<LitStr>()?.parse()?
                } else {
                    value.parse()?
                };
                set(&meta, &mut raw.len, ident)
            } else if meta.path.is_ident("max") {
                set(
                    &meta,
                    &mut raw.max,
                    expression(meta.value()?.parse()?)?.into(),
                )
            } else if meta.path.is_ident("nested") {
                set(&meta, &mut raw.nested, ())
            } else if meta.path.is_ident("skip") {
                set(&meta, &mut raw.skip, ())
            } else if meta.path.is_ident("subsection") {
                set(&meta, &mut raw.subsection, ())
            } else {
                Err(meta.error(
                    "unknown attribute, expected since, default, exists, nested, len, max, skip \
                     or subsection",
                ))
            }
        })?;
        Ok(raw)
    }
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

/// An expression, written as such or in a string.
fn expression(expr: Expr) -> Result<Expr> {
    match string(&expr) {
        Ok(text) => text.parse(),
        Err(_) => Ok(expr),
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
