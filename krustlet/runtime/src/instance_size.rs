//! What an instance of a module makes the node hold for the module's own parts, read from its bytes.
//!
//! A module declares globals, functions that are referred to, and elements that it may copy into its tables. Each instance has
//! its own of them, outside of its memories and tables: a hundred and sixty megabytes for a module of ten. wasmtime bounds a
//! part of it, asks nobody for it, and tells nobody how much it is; so it is counted here as wasmtime lays it out, rather too
//! much than too little.

use crate::engine::{CORE_INSTANCES, MAX_CONTEXT};
use crate::guest::MAX_HANDLES;
use wasmparser::{
    BinaryReaderError, CanonicalFunction, ComponentAlias, ComponentExternalKind, ComponentOuterAliasKind,
    ComponentTypeRef, ElementItems, ElementKind, Encoding, ExternalKind, Instance, Parser, Payload, TypeRef,
};

/// An instance's fixed part, and that of a module that wasmtime puts between two components.
const INSTANCE: u64 = 512;
/// An import, at most.
const IMPORT: u64 = 96;
const FUNCTION_REFERENCE: u64 = 32;
/// A global, memory, table, tag or segment of data, at most.
const ITEM: u64 = 48;
/// An element of a segment that is not copied at once.
const ELEMENT: u64 = 16;
/// A function that is lifted or lowered, with its part of what wasmtime puts between two components.
const CANONICAL_FUNCTION: u64 = 512;
/// A handle in its table, which may have room for twice as many.
const HANDLE: u64 = 2 * 24;

/// Part of what is kept with compiled code: another number where another size is told.
pub const REVISION: u32 = 1;

/// Bytes of one instance's own parts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Size {
    /// What wasmtime allows so much of.
    context: u64,
    elements: u64,
}

impl Size {
    fn add(&mut self, other: Self) {
        self.context = self.context.saturating_add(other.context);
        self.elements = self.elements.saturating_add(other.elements);
    }
}

/// A module or a component that is being read.
#[derive(Default)]
struct Scope {
    component: bool,
    size: Size,
    // Of a core module.
    functions: u64,
    referred: u64,
    // Of a component: its modules by index, none for what is not its own.
    modules: Vec<Option<Size>>,
    /// It has functions that take and give handles.
    functional: bool,
}

/// What one instance of this takes. Fails for what is no module.
pub fn of(wasm: &[u8]) -> Result<u64, BinaryReaderError> {
    let mut open: Vec<Scope> = Vec::new();
    let mut total = Size::default();
    // Of all modules together, where it is not known which of them an instance is of.
    let mut any = Size::default();
    let (mut components, mut instances, mut unknown) = (0_u64, 0_u64, 0_u64);
    let (mut parts, mut own_resources) = (0_u64, false);
    for payload in Parser::new(0).parse_all(wasm) {
        let payload = payload?;
        if let Payload::Version { encoding, .. } = payload {
            let component = encoding == Encoding::Component;
            let size = Size { context: INSTANCE, elements: 0 };
            open.push(Scope { component, size, ..Scope::default() });
            continue;
        }
        if let Payload::End(_) = payload {
            let Some(scope) = open.pop() else { continue };
            let size = scope.finish();
            parts += u64::from(scope.functional);
            match open.last_mut() {
                Some(parent) if !scope.component => {
                    any.add(size);
                    parent.modules.push(Some(size));
                }
                Some(_) => {
                    components += 1;
                    total.add(size);
                }
                None => total.add(size),
            }
            continue;
        }
        let Some(scope) = open.last_mut() else { continue };
        match payload {
            Payload::ComponentInstanceSection(section) => {
                for instance in section {
                    instances += u64::from(matches!(instance?, wasmparser::ComponentInstance::Instantiate { .. }));
                }
            }
            Payload::InstanceSection(section) => {
                for instance in section {
                    let Instance::Instantiate { module_index, .. } = instance? else { continue };
                    match scope.modules.get(module_index as usize).copied().flatten() {
                        Some(size) => scope.size.add(size),
                        None => unknown += 1,
                    }
                }
            }
            Payload::ComponentCanonicalSection(section) => {
                for function in section {
                    own_resources |= matches!(function?, CanonicalFunction::ResourceNew { .. });
                    scope.functional = true;
                    scope.size.context += CANONICAL_FUNCTION;
                }
            }
            payload => scope.read(payload)?,
        }
    }
    // A component that is there once may have several instances, and these again.
    let several = unknown > 0 || instances > components;
    if several {
        let most = u64::from(CORE_INSTANCES);
        total = Size { context: MAX_CONTEXT as u64, elements: any.elements.saturating_mul(most) };
    }
    // Handles to the host's resources are counted while there are any. A guest's own it makes, and its parts give each other,
    // without a call that could count them.
    let handles = if own_resources || several || parts > 1 { MAX_HANDLES as u64 * HANDLE } else { 0 };
    Ok(total.context.min(MAX_CONTEXT as u64).saturating_add(total.elements).saturating_add(handles))
}

impl Scope {
    fn read(&mut self, payload: Payload<'_>) -> Result<(), BinaryReaderError> {
        let mut items = 0;
        match payload {
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    self.functions += u64::from(matches!(import?.ty, TypeRef::Func(_) | TypeRef::FuncExact(_)));
                    self.size.context += IMPORT;
                }
            }
            Payload::FunctionSection(section) => self.functions += u64::from(section.count()),
            Payload::GlobalSection(section) => {
                items = section.count();
                // Each may begin as a reference to a function.
                self.referred += u64::from(items);
            }
            Payload::TableSection(section) => {
                items = section.count();
                self.referred += u64::from(items);
            }
            Payload::MemorySection(section) => items = section.count(),
            Payload::TagSection(section) => items = section.count(),
            Payload::DataSection(section) => items = section.count(),
            Payload::ExportSection(section) => {
                for export in section {
                    self.referred += u64::from(matches!(export?.kind, ExternalKind::Func | ExternalKind::FuncExact));
                }
            }
            Payload::ElementSection(section) => {
                items = section.count();
                for element in section {
                    let element = element?;
                    let count = u64::from(match element.items {
                        ElementItems::Functions(functions) => functions.count(),
                        ElementItems::Expressions(_, expressions) => expressions.count(),
                    });
                    self.referred += count;
                    if !matches!(element.kind, ElementKind::Active { .. }) {
                        self.size.elements = self.size.elements.saturating_add(count * ELEMENT);
                    }
                }
            }
            Payload::ComponentImportSection(section) => {
                for import in section {
                    if let ComponentTypeRef::Module(_) = import?.ty {
                        self.modules.push(None);
                    }
                }
            }
            Payload::ComponentAliasSection(section) => {
                for alias in section {
                    let module = matches!(
                        alias?,
                        ComponentAlias::Outer { kind: ComponentOuterAliasKind::CoreModule, .. }
                            | ComponentAlias::InstanceExport { kind: ComponentExternalKind::Module, .. }
                    );
                    if module {
                        self.modules.push(None);
                    }
                }
            }
            _ => {}
        }
        self.size.context = self.size.context.saturating_add(u64::from(items) * ITEM);
        Ok(())
    }

    /// Of a core module, or of a component's own instances.
    fn finish(&self) -> Size {
        let mut size = self.size;
        size.context = size.context.saturating_add(self.referred.min(self.functions) * FUNCTION_REFERENCE);
        size
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use wasmtime::{Config, Engine, InstanceAllocationStrategy, PoolingAllocationConfig};

    fn size(text: &str) -> u64 {
        of(&wat::parse_str(text).unwrap()).unwrap()
    }

    /// Whether wasmtime finds so much enough for an instance's context.
    fn suffices(wasm: &[u8], bytes: u64) -> bool {
        let mut pool = PoolingAllocationConfig::new();
        pool.total_component_instances(1).total_core_instances(100).total_memories(4).total_tables(8);
        pool.max_memories_per_component(4).max_tables_per_component(8).max_tables_per_module(8);
        pool.max_component_instance_size(bytes as usize).max_core_instance_size(bytes as usize);
        let mut config = Config::new();
        config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool)).concurrency_support(false);
        let engine = Engine::new(&config).unwrap();
        wasmtime::Module::new(&engine, wasm).is_ok()
    }

    #[test]
    fn what_is_counted_is_enough_for_wasmtime_and_not_much_more_than_it() {
        let many = |text: &str, times: usize| text.repeat(times);
        let modules = [
            "(module)".to_owned(),
            format!("(module {})", many("(global (mut i64) (i64.const 1))", 3000)),
            format!("(module {})", many("(func (export \"x\") (param i32))", 1)),
            format!("(module (func $f) (table 2000 funcref) (elem (i32.const 0) func {}))", many("$f ", 2000)),
            format!("(module {})", (0..2000).map(|n| format!("(func (export \"f{n}\"))")).collect::<String>()),
        ];
        for text in &modules {
            let wasm = wat::parse_str(text).unwrap();
            let counted = of(&wasm).unwrap();
            let shown = text.get(..text.len().min(80));
            assert!(suffices(&wasm, counted), "{counted}: {shown:?}");
            assert!(counted < 4096 || !suffices(&wasm, counted / 6), "{counted}: {shown:?}");
        }
    }

    #[test]
    fn elements_that_are_kept_for_later_are_counted_for_each_instance() {
        let module = |kind: &str| format!("(func $f) (table 1000 funcref) (elem {kind} func {})", "$f ".repeat(1000));
        let (active, passive) = (module("(i32.const 0)"), module(""));
        assert!(size(&format!("(module {active})")) < 2000);
        let one = size(&format!("(module {passive})"));
        assert!(one > 16_000);
        let twice = format!(
            "(component (core module $m {passive}) (core instance (instantiate $m)) (core instance (instantiate $m)))"
        );
        assert!(size(&twice) > 2 * 16_000 && size(&twice) < 2 * one + 2000);
    }

    #[test]
    fn handles_are_counted_where_a_guest_makes_its_own_or_has_parts_that_give_each_other_some() {
        let most = MAX_HANDLES as u64 * HANDLE;
        let run = r#"(core module $m (func (export "run"))) (core instance $i (instantiate $m))
            (func (export "run") (canon lift (core func $i "run")))"#;
        let bundle = r#"(component $c (import "a" (func $f)) (export "b" (func $f)))"#;
        assert!(size(&format!("(component {run})")) < most);
        assert!(size(&format!("(component {bundle} {run})")) < most, "as toolchains do it for each interface");
        let own = "(type $r (resource (rep i32))) (core func $new (canon resource.new $r))";
        assert!(size(&format!("(component {own} {run})")) >= most);
        let part = format!("(component $c {run}) (instance (instantiate $c))");
        assert!(size(&format!("(component {part} {run})")) >= most);
    }

    #[test]
    fn where_it_is_not_known_how_many_instances_there_are_it_is_as_many_as_there_may_be() {
        let module = format!("(core module $m (func $f) (elem func {}))", "$f ".repeat(1000));
        let nested = |instances: &str| {
            format!("(component (component $c {module} (core instance (instantiate $m))) {instances})")
        };
        let once = size(&nested("(instance (instantiate $c))"));
        assert!((16_000..20_000).contains(&once), "{once}");
        let many = 16_000 * u64::from(CORE_INSTANCES);
        assert!(size(&nested("(instance (instantiate $c)) (instance (instantiate $c))")) > many);
        let outer = format!(
            "(component {module} (component $c (alias outer 1 $m (core module $o)) (core instance (instantiate $o)))
             (instance (instantiate $c)))"
        );
        assert!(size(&outer) > many);
    }
}
