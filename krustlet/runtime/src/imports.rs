//! What a module asks for and offers, read from its bytes alone: what the node cannot run is refused before it is compiled.
//!
//! Only types are looked at, so that it takes milliseconds. That the bodies of functions are valid is the compiler's to say,
//! that the types of what is imported fit is the linker's.

use crate::artifact::{Digest, cut, shown};
use crate::error::LoadError;
use wasmparser::component_types::{ComponentEntityType, ComponentInstanceTypeId};
use wasmparser::types::{Types, TypesRef};
use wasmparser::{Encoding, Parser, Payload, ValidPayload, Validator, WasmFeatures};

pub const HANDLER: &str = "wasi:http/incoming-handler@0.2.";
pub const RUN: &str = "wasi:cli/run@0.2.";
pub const START: &str = "_start";
const PREVIEW_1: &str = "wasi_snapshot_preview1";

/// The interfaces of WASI 0.2 that the node offers to components: the worlds wasi:cli/command and wasi:http/proxy.
pub const OFFERED: [&str; 29] = [
    "wasi:cli/environment",
    "wasi:cli/exit",
    "wasi:cli/stderr",
    "wasi:cli/stdin",
    "wasi:cli/stdout",
    "wasi:cli/terminal-input",
    "wasi:cli/terminal-output",
    "wasi:cli/terminal-stderr",
    "wasi:cli/terminal-stdin",
    "wasi:cli/terminal-stdout",
    "wasi:clocks/monotonic-clock",
    "wasi:clocks/wall-clock",
    "wasi:filesystem/preopens",
    "wasi:filesystem/types",
    "wasi:http/outgoing-handler",
    "wasi:http/types",
    "wasi:io/error",
    "wasi:io/poll",
    "wasi:io/streams",
    "wasi:random/insecure",
    "wasi:random/insecure-seed",
    "wasi:random/random",
    "wasi:sockets/instance-network",
    "wasi:sockets/ip-name-lookup",
    "wasi:sockets/network",
    "wasi:sockets/tcp",
    "wasi:sockets/tcp-create-socket",
    "wasi:sockets/udp",
    "wasi:sockets/udp-create-socket",
];

/// Refuses what the node does not run, with the reason. Gives whether it is a component.
pub fn check(digest: &Digest, wasm: &[u8]) -> Result<bool, LoadError> {
    let (types, component) = read(wasm).map_err(|cause| invalid(digest, &cause))?;
    match component {
        true => check_component(digest, wasm, types.as_ref())?,
        false => check_core(digest, types.as_ref())?,
    }
    Ok(component)
}

fn invalid(digest: &Digest, cause: &str) -> LoadError {
    LoadError::InvalidModule { digest: digest.to_string(), cause: cut(&cause) }
}

/// The types of a module, and whether it is a component.
fn read(wasm: &[u8]) -> Result<(Types, bool), String> {
    // What is newer than the engine is read too, so that it can be named.
    let mut validator = Validator::new_with_features(WasmFeatures::all());
    let mut component = false;
    let mut depth = 0;
    for payload in Parser::new(0).parse_all(wasm) {
        let payload = payload.map_err(|error| error.to_string())?;
        match &payload {
            Payload::Version { encoding, .. } => {
                if depth == 0 {
                    component = *encoding == Encoding::Component;
                }
                depth += 1;
            }
            Payload::End(_) => depth -= 1,
            _ => {}
        }
        if let ValidPayload::End(types) = validator.payload(&payload).map_err(|error| error.to_string())?
            && depth == 0
        {
            return Ok((types, component));
        }
    }
    Err("it ends too early".into())
}

fn check_core(digest: &Digest, types: TypesRef<'_>) -> Result<(), LoadError> {
    for (module, name, _) in types.core_imports().into_iter().flatten() {
        if module != PREVIEW_1 {
            return Err(LoadError::UnsupportedImport {
                digest: digest.to_string(),
                import: format!("{}.{}", shown(module), shown(name)),
                hint: format!("; a core module may import {PREVIEW_1} only{}", toolchain_of(module)),
            });
        }
    }
    if !types.core_exports().into_iter().flatten().any(|(name, _)| name == START) {
        return Err(invalid(
            digest,
            &format!(
                "it is a core module without a function {START}, so that there is nothing to run; build a command (for Rust: \
                 cargo build --target wasm32-wasip1) or a component (cargo build --target wasm32-wasip2)"
            ),
        ));
    }
    Ok(())
}

/// What is known of who makes modules that import this.
fn toolchain_of(module: &str) -> &'static str {
    match module {
        "__wbindgen_placeholder__" | "wbg" | "gojs" | "go" => {
            "; this one is built for a JavaScript host: build it for WASI, e.g. cargo build --target wasm32-wasip2 or GOOS=wasip1"
        }
        "wasi_unstable" => "; this one is built for an older WASI: build it again with a current toolchain",
        "env" => "; this one leaves symbols undefined: build it for WASI, e.g. with wasi-sdk or --target wasm32-wasip2",
        _ => "",
    }
}

fn check_component(digest: &Digest, wasm: &[u8], types: TypesRef<'_>) -> Result<(), LoadError> {
    let (imports, exports) = names(wasm);
    if let Some(name) = exports.iter().chain(&imports).find(|name| newer_wasi(name).is_some()) {
        let version = newer_wasi(name).unwrap_or_default();
        return Err(invalid(
            digest,
            &format!(
                "it is a component of WASI {version} ({}); this node runs WASI 0.2 ({HANDLER}x or {RUN}x) and preview 1: build \
                 it for that, e.g. cargo build --target wasm32-wasip2",
                shown(name)
            ),
        ));
    }
    for name in &imports {
        let needed = types.component_item_for_import(name).is_none_or(|item| needs_a_definition(types, item.ty));
        if needed && !is_offered(name) {
            return Err(LoadError::UnsupportedImport {
                digest: digest.to_string(),
                import: shown(name),
                hint: "; it offers the interfaces of wasi:cli and wasi:http 0.2".into(),
            });
        }
    }
    if !exports.iter().any(|name| [HANDLER, RUN].iter().any(|interface| is_release(name.strip_prefix(interface)))) {
        let exports: Vec<String> = exports.iter().map(|name| shown(name)).collect();
        return Err(invalid(
            digest,
            &format!(
                "it exports neither {HANDLER}x nor {RUN}x, so that there is nothing to run; its exports: {exports:?}"
            ),
        ));
    }
    Ok(())
}

/// The names that a component itself imports and exports.
fn names(wasm: &[u8]) -> (Vec<String>, Vec<String>) {
    let (mut imports, mut exports, mut depth) = (Vec::new(), Vec::new(), 0);
    // It was valid up to here; what is not readable was refused before.
    for payload in Parser::new(0).parse_all(wasm).map_while(Result::ok) {
        match payload {
            Payload::Version { .. } => depth += 1,
            Payload::End(_) => depth -= 1,
            Payload::ComponentImportSection(section) if depth == 1 => {
                imports.extend(section.into_iter().map_while(Result::ok).map(|import| import.name.name.to_owned()));
            }
            Payload::ComponentExportSection(section) if depth == 1 => {
                exports.extend(section.into_iter().map_while(Result::ok).map(|export| export.name.name.to_owned()));
            }
            _ => {}
        }
    }
    (imports, exports)
}

/// The version of an interface of WASI that came after 0.2.
fn newer_wasi(name: &str) -> Option<&str> {
    let (_, version) = name.strip_prefix("wasi:")?.split_once('@')?;
    let mut numbers = version.split(['.', '-']).map(|number| number.parse::<u32>().unwrap_or(0));
    let (major, minor) = (numbers.next()?, numbers.next()?);
    ((major, minor) > (0, 2)).then_some(version)
}

fn is_offered(name: &str) -> bool {
    name.split_once("@0.2.").is_some_and(|(interface, patch)| OFFERED.contains(&interface) && is_release(Some(patch)))
}

/// Whether it is the last number of a release of WASI 0.2: those are compatible with each other, the drafts before are not.
fn is_release(patch: Option<&str>) -> bool {
    patch.is_some_and(|patch| !patch.is_empty() && patch.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Types need nobody to define them.
fn needs_a_definition(types: TypesRef<'_>, entity: ComponentEntityType) -> bool {
    match entity {
        ComponentEntityType::Type { .. } => false,
        ComponentEntityType::Instance(instance) => instance_needs_a_definition(types, instance),
        _ => true,
    }
}

fn instance_needs_a_definition(types: TypesRef<'_>, instance: ComponentInstanceTypeId) -> bool {
    types[instance].exports.values().any(|export| needs_a_definition(types, export.ty))
}
