// The arrow keys go from the stop in view to the next. Without this script, the links do.
let settling;
const focus = (stop) => stop?.querySelector("[tabindex='-1']").focus({ preventScroll: true });
addEventListener("hashchange", () => {
  const stop = document.getElementById(location.hash.slice(1));
  if (stop?.matches("[data-stop]") && !stop.contains(document.activeElement)) focus(stop);
});
addEventListener("keydown", (event) => {
  const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!way || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.target.closest(".scroll")) return; // which the key scrolls
  const stops = [...document.querySelectorAll("[data-stop]")];
  const below = stops.findIndex((stop) => stop.getBoundingClientRect().top > 60);
  const next = stops[(below < 0 ? stops.length : below) - 1 + way];
  if (!next) return;
  event.preventDefault();
  next.scrollIntoView();
  focus(next);
  clearTimeout(settling); // browsers ignore an address that changes too often
  settling = setTimeout(() => location.replace("#" + next.id), 200);
});
